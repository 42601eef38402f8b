"""Ranges of parameters, as operators take them: int64 ``[R, 2]`` on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor


def check_bounds(ranges: Tensor) -> None:
    """Refuse what are no pairs of integers."""
    message = f"ranges must be int64 [R, 2], got {ranges.dtype} {tuple(ranges.shape)}"
    torch._check(ranges.dtype == torch.int64 and ranges.dim() == 2 and ranges.shape[1] == 2, partial(str, message))


def check_ranges(ranges: Sequence[Tensor], num_params: int) -> None:
    """Refuse ranges that are not ascending, disjoint parts of the parameters."""
    for pairs in ranges:
        bounds = [0, *pairs.flatten().tolist(), num_params]
        message = f"ranges must be ascending, disjoint parts of {num_params} parameters, got {pairs.tolist()}"
        torch._check(all(a <= b for a, b in itertools.pairwise(bounds)), partial(str, message))


def selected(ranges: Tensor, first: int, stop: int) -> Tensor:
    """Which parameters of ``[first, stop)`` the ranges hold, counted from ``first``."""
    params = torch.arange(first, stop)
    if len(ranges) == 0:
        return params[:0]
    last_begun = torch.searchsorted(ranges[:, 0].contiguous(), params, right=True) - 1
    return ((last_begun >= 0) & (params < ranges[last_begun, 1])).nonzero().squeeze(1)
