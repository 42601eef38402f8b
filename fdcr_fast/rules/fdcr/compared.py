"""Distances of the clients to their mean over some of the parameters, or of their directions alone."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.pairwise.gram import GramView, Ranges, grams
from fdcr_fast.rules.param_groups import ParamGroups

NAMED = ("all", "head", "features")
# What rounding makes of clients that are alike must not be taken for clusters.
_CANCELLED = 1e-12  # a squared distance of 0, beside the squares that it is the difference of
_DECIMALS = 12  # to which cosines are told apart


def check_parameters(parameters: Any) -> None:
    """Raise unless ``parameters`` is a name in ``NAMED`` or ranges, of which there is at least one.

    Raises:
        ValueError: it is anything else.
    """
    ranges = isinstance(parameters, Sequence) and not isinstance(parameters, str) and len(parameters) > 0
    if parameters not in NAMED and not (ranges and all(map(_is_range, parameters))):
        raise ValueError(f"parameters must be one of {NAMED} or ranges (start, stop), got {parameters!r}")


def _is_range(value: Any) -> bool:
    if isinstance(value, slice):
        return value.step in (None, 1)
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(bound, Integral) for bound in value)


def ranges_of(parameters: str | Ranges, groups: ParamGroups | None, num_params: int) -> list[slice]:
    """The ranges of the model's parameters that are compared.

    Raises:
        ValueError: a group is asked for, and the groups are not known.
    """
    if parameters == "all":
        return [slice(0, num_params)]
    if isinstance(parameters, str):
        if groups is None:
            raise ValueError(f"parameters={parameters!r} takes groups, such as ParamGroups.from_module(model)")
        return list(getattr(groups, parameters))
    pairs = (part.indices(num_params)[:2] if isinstance(part, slice) else part for part in parameters)
    return [slice(*pair) for pair in pairs]


def squared_distances(
    clients: ClientUpdates, alpha: Tensor, ranges: Ranges, *, reweight: bool, directions: bool
) -> Tensor:
    """``|u - u_k|^2`` over the ranges, float64 ``[K]``, NaN for clients that are not valid.

    All of it follows from the inner products of the clients, which one reading of the ranges gives.

    Args:
        clients: The round.
        alpha: ``alpha_k [K]`` of ``u = sum_k alpha_k u_k``.
        ranges: Parameters that count.
        reweight: Whether ``u_k`` is ``I_k delta_k``, not ``delta_k``.
        directions: Whether ``u`` and ``u_k`` are brought to length 1 first, which makes it ``2 (1 - cos)``; a vector of
            zeros has cosine 0.
    """
    transform = "reweighted_update" if reweight else "update"
    (inner,) = grams(clients, views=[GramView(transform, ranges)], precision="float64")
    shares = clients.of_valid(alpha)
    if clients.rows is not None:
        inner = inner[clients.rows][:, clients.rows]
    along = inner @ shares
    squares, mean_square = inner.diagonal(), shares @ along
    if directions:
        lengths = (squares * mean_square).sqrt()
        cosines = torch.where(lengths > 0, along / lengths, 0.0).clamp(-1, 1)
        distances = 2 - 2 * cosines.round(decimals=_DECIMALS)
    else:
        distances = mean_square - 2 * along + squares
        distances = torch.where(distances > _CANCELLED * (mean_square + squares), distances, 0.0)
    result = torch.full_like(alpha, torch.nan)
    result[clients.valid] = distances
    return result
