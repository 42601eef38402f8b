"""The clients' updates a few parameters at a time, in plain PyTorch: for what no operator computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.tiles import Span
from fdcr_fast.server.transfer import sent

_BLOCK = 1 << 18  # numbers of all clients that are looked at together


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
        yield from _columns(clients, span, [slice(span.first, span.first + span.num_params)])


def column_sums(
    clients: ClientUpdates, term: Callable[[Columns], Tensor], *size: int, ranges: Iterable[slice] | None = None
) -> Tensor:
    """Sums over parameters of numbers of each valid client, float64 ``[*size, n]``, where the rows are.

    Args:
        clients: Of the round.
        term: These sums over a block of parameters, float64 ``[*size, n]``.
        size: How many numbers of a client.
        ranges: Over which of the model's parameters; None for all.
    """
    here = [
        slice(part.start - clients.shard.first, part.stop - clients.shard.first)
        for part in _merged([slice(0, clients.num_params)] if ranges is None else ranges)
    ]

    def read(span: Span, total: Tensor) -> Tensor:
        for columns in _columns(clients, span, here):
            total = total + term(columns)
        return total

    zeros = torch.zeros(*size, int(clients.valid.sum()), dtype=torch.float64, device=clients.tiles.device)
    return clients.sum(zeros, read)


def _merged(ranges: Iterable[slice]) -> list[slice]:
    """The ranges in order; those that follow each other, such as weight and bias, are one."""
    merged: list[slice] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            part = slice(merged.pop().start, part.stop)
        merged.append(part)
    return merged


def _columns(clients: ClientUpdates, span: Span, ranges: Sequence[slice]) -> Iterator[Columns]:
    """What a span holds of the ranges, in blocks of bounded size that lie in whole tiles or within one."""
    valid = None if clients.rows is None else sent(clients.rows, clients.tiles.device)
    _, K, length = span.updates.shape
    width = max(1, _BLOCK // K)
    together = max(1, width // length) * length
    end = span.first + span.num_params
    for begin in range(span.first, end, together):
        for part in ranges:
            last = min(begin + together, end, part.stop)
            for start in range(max(begin, part.start), last, width):
                stop = min(start + width, last)
                block = _joined(span.updates, start - span.first, stop - span.first)
                yield Columns(slice(start, stop), block if valid is None else block.index_select(0, valid))


def _joined(matrix: Tensor, start: int, stop: int) -> Tensor:
    """Columns ``[start, stop)`` of a tiled client matrix ``[T, K, L]`` as ``[K, stop - start]``; of one tile a view."""
    length = matrix.shape[2]
    first = start // length
    rows = matrix[first : -(-stop // length)].transpose(0, 1).flatten(1)
    return rows[:, start - first * length : stop - first * length]


def squared_length(vector: Tensor) -> Tensor:
    """Sum of squares in float64."""
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length.square()


def dot_products(clients: ClientUpdates, vector: Tensor) -> Tensor:
    """``<delta_k, vector>`` of the valid clients with a vector ``[P]``, float64 ``[n]``."""
    return column_sums(clients, lambda columns: columns.updates.double() @ vector[columns.params].double()).cpu()


def client_params(global_params: Tensor, clients: ClientUpdates) -> Iterator[Tensor]:
    """``w + delta_k [P]`` of one valid client after the other, in the dtype of the global parameters."""
    n = int(clients.valid.sum())
    together = min(n, max(1, 16 * _BLOCK // clients.num_params))  # rounds in files are read once for so many
    for first in range(0, n, together):
        rows = global_params.repeat(min(together, n - first), 1)
        for params, updates in column_blocks(clients):
            rows[:, params] += updates[first : first + together].to(rows.dtype)
        yield from rows
