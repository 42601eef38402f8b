"""Comparisons of all pairs of valid clients, from one Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.pairwise.gram import gram


def valid_gram(clients: ClientUpdates) -> Tensor:
    """``<delta_i, delta_j>`` of the valid clients, float64 ``[n, n]``."""
    valid = clients.valid
    return gram(clients, precision="float64").cpu()[valid][:, valid]


def squared_distances(gram: Tensor) -> Tensor:
    """``G_ii + G_jj - 2 G_ij``, not negative, and 0 on the diagonal."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_(min=0).fill_diagonal_(0)


def cosines(gram: Tensor) -> Tensor:
    """``G_ij / sqrt(G_ii G_jj)``; a vector of zeros has cosine 0 with all others."""
    lengths = gram.diagonal().sqrt()
    cosine = gram / lengths[:, None] / lengths
    return torch.where((lengths > 0) & (lengths[:, None] > 0), cosine, 0.0).clamp_(-1, 1).fill_diagonal_(1)
