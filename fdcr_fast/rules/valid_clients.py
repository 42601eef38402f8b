"""Vectors over all clients of a round, from what is known of the valid ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates


def valid_ids(clients: ClientUpdates) -> list[Any]:
    """Ids of the valid clients."""
    return [client for client, valid in zip(clients.clients, clients.valid.tolist(), strict=True) if valid]


def of_all(clients: ClientUpdates, values: Tensor) -> Tensor:
    """``[K]`` from one value of every valid client, 0 for the others."""
    result = torch.zeros(len(clients.clients), dtype=values.dtype)
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
