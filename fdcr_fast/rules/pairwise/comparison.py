"""Comparisons of all pairs of valid clients, from one Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.pairwise.gram import SINGLE_ERROR, gram

Decision = TypeVar("Decision")


def valid_gram(clients: ClientUpdates, precision: str = "float64") -> Tensor:
    """``<delta_i, delta_j>`` of the valid clients, float64 ``[n, n]``, with sums of this precision."""
    valid = clients.valid
    return gram(clients, precision=precision).cpu()[valid][:, valid]


def decided(clients: ClientUpdates, decide: Callable[[Tensor, float], Decision | None]) -> Decision:
    """What a rule decides from inner products: from those of float32 where they leave no doubt, else of float64.

    Args:
        clients: The round.
        decide: Gets :func:`valid_gram` and ``error``: each of its elements is off by at most
            ``error |delta_i| |delta_j|``. It returns None where the decision might be another one within that, but
            never for an error of 0.
    """
    if readings.fits_single(clients):
        decision = decide(valid_gram(clients, "float32"), SINGLE_ERROR)
        if decision is not None:
            return decision
    decision = decide(valid_gram(clients), 0.0)
    assert decision is not None, "without an error there is no doubt"
    return decision


def squared_distances(gram: Tensor) -> Tensor:
    """``G_ii + G_jj - 2 G_ij``, not negative, and 0 on the diagonal."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_(min=0).fill_diagonal_(0)


def cosines(gram: Tensor) -> Tensor:
    """``G_ij / sqrt(G_ii G_jj)``; a vector of zeros has cosine 0 with all others."""
    lengths = gram.diagonal().sqrt()
    cosine = gram / lengths[:, None] / lengths
    return torch.where((lengths > 0) & (lengths[:, None] > 0), cosine, 0.0).clamp_(-1, 1).fill_diagonal_(1)
