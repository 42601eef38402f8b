"""The clients' updates a few parameters at a time, in plain PyTorch: for what no operator computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.round import readings
from fdcr_fast.round.blocks import cut
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.tiles import MatrixTiles, Span
from fdcr_fast.round.vectors import sent

_BLOCK = 1 << 18  # numbers of the valid clients that are looked at together
_MODELS = 1 << 24  # numbers of the models that are made together


class Columns(NamedTuple):
    """Consecutive parameters of the valid clients.

    Attributes:
        params: Their range among the parameters that are here.
        updates: ``[n, len]``, not to be written to.
    """

    params: slice
    updates: Tensor


def column_blocks(clients: ClientUpdates) -> Iterator[Columns]:
    """All parameters that are here in order, in the dtype of the clients; a block is valid until the next one."""
    for span in clients.spans():
        yield from _columns(clients, span)


def column_sums(clients: ClientUpdates, term: Callable[[Columns], Tensor], *size: int) -> Tensor:
    """Sums over parameters of numbers of each valid client, float64 ``[*size, n]``, where the rows are.

    Args:
        clients: The round.
        term: The sums over a block of parameters, whose updates are float64.
        size: Number of sums of a client, in one or several dimensions.
    """

    def read(span: Span, total: Tensor) -> Tensor:
        for params, updates in _columns(clients, span):
            total = total + term(Columns(params, updates.double()))
        return total

    zeros = torch.zeros(*size, clients.num_valid, dtype=torch.float64, device=clients.tiles.device)
    return clients.sum(zeros, read)


def _columns(clients: ClientUpdates, span: Span) -> Iterator[Columns]:
    """What a span holds, in blocks of bounded size: whole tiles, joined, or a part of one."""
    valid = None if clients.rows is None else sent(clients.rows, clients.tiles.device)
    length = span.updates.shape[2]
    width = max(1, _BLOCK // clients.num_valid)
    width -= width % min(width, length)
    for block in cut(span, [*range(span.first + width, span.first + span.num_params, width)]):
        rows = block.updates if valid is None else _rows(block.updates, valid)
        joined = rows.transpose(0, 1).flatten(1)
        yield Columns(slice(block.first, block.first + block.num_params), joined[:, : block.num_params])


def _rows(updates: Tensor, chosen: Tensor) -> Tensor:
    """Some clients of a block; ``index_select`` would first copy all of one that is not contiguous."""
    return updates.index_select(1, chosen) if updates.is_contiguous() else updates[:, chosen]


def squared_length(vector: Tensor) -> Tensor:
    """The sum of squares in float64."""
    return ops.squared_norm(vector.detach()[None, None], len(vector))[0]


def dot_products(clients: ClientUpdates, vector: Tensor, ranges: Sequence[slice] | None = None) -> Tensor:
    """``<delta_k, vector>`` of the valid clients with a vector ``[P]`` over ranges, None for all; float64 ``[n]``."""
    return clients.of_valid(readings.moments(clients, [readings.MomentsView(vector, ranges)])[0, 0].cpu())


def client_params(global_params: Tensor, clients: ClientUpdates) -> Iterator[Tensor]:
    """``w + delta_k [P]`` of one valid client after the other, in the dtype of the global parameters."""
    if isinstance(clients.tiles, MatrixTiles):
        yield from (global_params + row.to(global_params.dtype) for row in _in_memory(clients.tiles, clients.valid))
        return
    for rows in whole_updates(clients, global_params.dtype):
        yield from rows.add_(global_params)


def whole_updates(clients: ClientUpdates, dtype: torch.dtype) -> Iterator[Tensor]:
    """The updates ``[m, P]`` of a few valid clients after the others, to be written to."""
    if isinstance(clients.tiles, MatrixTiles):
        yield from (row.to(dtype, copy=True)[None] for row in _in_memory(clients.tiles, clients.valid))
        return
    for some in _batches(clients):
        rows = torch.empty(some.num_valid, clients.num_params, dtype=dtype, device=clients.tiles.device)
        for params, updates in column_blocks(some):
            rows[:, params] = updates.to(dtype)
        yield rows


def _in_memory(tiles: MatrixTiles, valid: Tensor) -> Iterator[Tensor]:
    """The updates ``[P]`` of one valid client after the other, where all lie in memory."""
    return (tiles.updates[:, k].flatten()[: tiles.num_params] for k in valid.nonzero().flatten().tolist())


def _batches(clients: ClientUpdates) -> Iterator[ClientUpdates]:
    """The round with a few of its valid clients after the others: one in a file is read once for so many."""
    for batch in clients.valid.nonzero().flatten().split(max(1, _MODELS // clients.num_params)):
        yield clients.with_valid(torch.zeros_like(clients.valid).index_fill_(0, batch, True))
