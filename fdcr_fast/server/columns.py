"""The clients' updates a few parameters at a time, in plain PyTorch: for what no operator computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.tiles import Span
from fdcr_fast.server.transfer import sent

_BLOCK = 1 << 20  # numbers of all clients that are looked at together


class Columns(NamedTuple):
    """Consecutive parameters of the valid clients.

    Attributes:
        params: Which of the parameters that are here.
        updates: ``[n, len]`` in the dtype of the clients, not to be written to.
    """

    params: slice
    updates: Tensor


def column_blocks(clients: ClientUpdates) -> Iterator[Columns]:
    """All parameters that are here in order; a block is valid until the next one."""
    for span in clients.spans():
        yield from _columns(clients, span)


def _columns(clients: ClientUpdates, span: Span) -> Iterator[Columns]:
    valid = None if clients.rows is None else sent(clients.rows, clients.tiles.device)
    tiles, K, length = span.updates.shape
    width = max(1, _BLOCK // K)
    together = max(1, width // length)
    for t in range(0, tiles, together):
        rows = span.updates[t : t + together].transpose(0, 1).flatten(1)  # of one tile a view
        size = min(rows.shape[1], span.num_params - t * length)
        first = span.first + t * length
        for start in range(0, size, width):
            stop = min(start + width, size)
            block = rows[:, start:stop]
            yield Columns(slice(first + start, first + stop), block if valid is None else block.index_select(0, valid))


def column_sums(clients: ClientUpdates, term: Callable[[Columns], Tensor]) -> Tensor:
    """The sum over all parameters of a number of each valid client, float64 ``[n]``."""

    def read(span: Span, total: Tensor) -> Tensor:
        for columns in _columns(clients, span):
            total = total + term(columns)
        return total

    zeros = torch.zeros(int(clients.valid.sum()), dtype=torch.float64, device=clients.tiles.device)
    return clients.sum(zeros, read).cpu()


def squared_length(vector: Tensor) -> Tensor:
    """Sum of squares in float64."""
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length.square()


def dot_products(clients: ClientUpdates, vector: Tensor) -> Tensor:
    """``<delta_k, vector>`` of the valid clients with a vector ``[P]``, float64 ``[n]``."""
    return column_sums(clients, lambda columns: columns.updates.double() @ vector[columns.params].double())


def client_params(global_params: Tensor, clients: ClientUpdates) -> Iterator[Tensor]:
    """``w + delta_k [P]`` of one valid client after the other, in the dtype of the global parameters."""
    n = int(clients.valid.sum())
    together = min(n, max(1, 16 * _BLOCK // clients.num_params))  # rounds in files are read once for so many
    for first in range(0, n, together):
        rows = global_params.repeat(min(together, n - first), 1)
        for params, updates in column_blocks(clients):
            rows[:, params] += updates[first : first + together].to(rows.dtype)
        yield from rows
