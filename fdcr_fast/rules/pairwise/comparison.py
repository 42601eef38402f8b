"""Comparisons of all pairs of valid clients, from one Gram matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.gram import gram


def valid_gram(clients: ClientUpdates, precision: str = "float64") -> Tensor:
    """``<delta_i, delta_j>`` of the valid clients, float64 ``[n, n]``."""
    valid = clients.valid
    return gram(clients, precision=precision).cpu()[valid][:, valid]


def squared_distances(gram: Tensor) -> Tensor:
    """``G_ii + G_jj - 2 G_ij``, not negative, and 0 on the diagonal."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_(min=0).fill_diagonal_(0)


def cosines(gram: Tensor) -> Tensor:
    """``G_ij / sqrt(G_ii G_jj)``; a vector of zeros has cosine 0 with all others."""
    lengths = gram.diagonal().sqrt()
    cosine = gram / lengths[:, None] / lengths
    return torch.where((lengths > 0) & (lengths[:, None] > 0), cosine, 0.0).clamp_(-1, 1).fill_diagonal_(1)


def valid_ids(clients: ClientUpdates) -> list[Any]:
    """Ids of the valid clients."""
    return [client for client, valid in zip(clients.clients, clients.valid.tolist(), strict=True) if valid]


def of_all(clients: ClientUpdates, values: Tensor, others: Any = 0) -> Tensor:
    """``[K]`` from one value of every valid client."""
    result = torch.full((len(clients.clients),), others, dtype=values.dtype)
    result[clients.valid] = values
    return result


def chosen(clients: ClientUpdates, ranks: Tensor) -> Tensor:
    """bool ``[K]`` from positions among the valid clients."""
    rows = clients.valid.nonzero().flatten()
    result = torch.zeros(len(clients.clients), dtype=torch.bool)
    result[rows[ranks]] = True
    return result


def equal_weights(kept: Tensor) -> Tensor:
    """``1 / m`` for each of the ``m`` that are kept, float64 ``[K]``."""
    return kept.double() / kept.sum().clamp(min=1)
