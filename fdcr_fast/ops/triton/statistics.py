"""Statistics of every client's row, and the copy that takes them: memory-bound, one reading."""

# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast.ops.triton.elements import rounded, span, tiled
from fdcr_fast.ops.triton.launch import blocks, launch, power_of_two

_CHUNK = 8192  # columns of one program
_COLUMNS = 1024  # of them at a time


@triton.jit
def client_statistics(
    values,
    norm,
    low,
    high,
    clients,
    parameters,
    length,
    columns,
    tile_stride,
    client_stride,
    column_stride,
    TILED: tl.constexpr,
    NORM: tl.constexpr,
    RANGE: tl.constexpr,
    CLIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    k = span(tl.program_id(1).to(tl.int64) * CLIENTS, CLIENTS)
    known = k < clients
    rows = values + k[:, None] * client_stride
    squares = tl.zeros((CLIENTS, COLUMNS), tl.float64)
    exact = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    smallest = tl.full((CLIENTS, COLUMNS), float("inf"), exact)
    largest = tl.full((CLIENTS, COLUMNS), float("-inf"), exact)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, parameters), COLUMNS):
        v = span(start, COLUMNS)
        at = tiled(v, length, tile_stride, column_stride, TILED)
        x = tl.load(rows + at[None, :], mask=known[:, None] & (v < columns)[None, :], other=0.0).to(exact)
        there = (v < parameters)[None, :]
        if NORM:
            wide = tl.where(there, x, 0.0).to(tl.float64)
            squares += wide * wide
        if RANGE:
            smallest = tl.minimum(smallest, tl.where(there, x, float("inf")), propagate_nan=tl.PropagateNan.ALL)
            largest = tl.maximum(largest, tl.where(there, x, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    to = tl.program_id(0).to(tl.int64) * clients + k
    if NORM:
        tl.store(norm + to, tl.sum(squares, axis=1), mask=known)
    if RANGE:
        undefined = tl.max((smallest != smallest).to(tl.int32), axis=1) > 0
        nan = float("nan")
        tl.store(low + to, tl.where(undefined, nan, tl.min(smallest, axis=1).to(tl.float64)), mask=known)
        tl.store(high + to, tl.where(undefined, nan, tl.max(largest, axis=1).to(tl.float64)), mask=known)


def _statistics(values: Tensor, num_params: int, *, norm: bool, range: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Partial results ``[chunks, K]``; those that are not wanted are empty."""
    tiles, clients, length = values.shape
    chunks, group = blocks(num_params, _CHUNK), power_of_two(clients, most=4)
    parts = [values.new_empty(chunks if wanted else 0, clients, dtype=torch.float64) for wanted in (norm, range, range)]
    launch(
        client_statistics,
        (chunks, blocks(clients, group)),
        values,
        *parts,
        clients,
        num_params,
        length,
        tiles * length,
        *values.stride(),
        TILED=tiles > 1,
        NORM=norm,
        RANGE=range,
        CLIENTS=group,
        COLUMNS=_COLUMNS,
        CHUNK=_CHUNK,
    )
    return parts[0], parts[1], parts[2]


def importance_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest Fisher entry per client."""
    _, low, high = _statistics(fishers, num_params, norm=False, range=True)
    return low.amin(0), high.amax(0)


def squared_norm(updates: Tensor, num_params: int) -> Tensor:
    """Sum of squares per client in float64."""
    return _statistics(updates, num_params, norm=True, range=False)[0].sum(0)


@triton.jit
def fill(
    values,
    row,
    statistics,
    size,
    begin,
    length,
    value_stride,
    tile_stride,
    column_stride,
    TILED: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    squares = tl.zeros((COLUMNS,), tl.float64)
    exact = tl.float64 if row.dtype.element_ty == tl.float64 else tl.float32
    smallest = tl.full((COLUMNS,), float("inf"), exact)
    largest = tl.full((COLUMNS,), float("-inf"), exact)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, size), COLUMNS):
        i = span(start, COLUMNS)
        there = i < size
        x = rounded(tl.load(values + i * value_stride, mask=there, other=0.0), row.dtype.element_ty)
        tl.store(row + tiled(begin + i, length, tile_stride, column_stride, TILED), x, mask=there)
        x = x.to(exact)
        wide = x.to(tl.float64)
        squares += wide * wide
        smallest = tl.minimum(smallest, tl.where(there, x, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(largest, tl.where(there, x, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    undefined = tl.max((smallest != smallest).to(tl.int32), axis=0) > 0
    to = statistics + tl.program_id(0).to(tl.int64) * 3
    nan = float("nan")
    tl.store(to, tl.sum(squares, axis=0))
    tl.store(to + 1, tl.where(undefined, nan, tl.min(smallest, axis=0).to(tl.float64)))
    tl.store(to + 2, tl.where(undefined, nan, tl.max(largest, axis=0).to(tl.float64)))


def fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> Tensor:
    """Copy a vector into tiles, with statistics of what is kept."""
    tiles, length = row.shape
    values = [piece.flatten() for piece in values]
    if base is not None:
        parts_of_base = base.to(row.device).split([len(piece) for piece in values])
        values = [piece.to(part) - part for piece, part in zip(values, parts_of_base, strict=True)]
    chunks = [blocks(len(piece), _CHUNK) for piece in values]
    parts = row.new_empty(sum(chunks), 3, dtype=torch.float64)
    if len(parts) == 0:
        return statistics.clone()
    begin, waits = 0, statistics.device.type == "cpu"  # below: what pieces are copied from is free again then
    for piece, part in zip(values, parts.split(chunks), strict=True):
        piece = piece.to(row.device, non_blocking=waits)
        launch(
            fill,
            (len(part),),
            piece,
            row,
            part,
            len(piece),
            begin,
            length,
            piece.stride(0),
            *row.stride(),
            TILED=tiles > 1,
            COLUMNS=_COLUMNS,
            CHUNK=_CHUNK,
        )
        begin += len(piece)
    norm, low, high = parts.sum(0)[0], parts[:, 1].amin(), parts[:, 2].amax()
    norm, low, high = torch.stack([norm, low, high]).to(statistics.device)
    return torch.stack([statistics[0] + norm, torch.minimum(statistics[1], low), torch.maximum(statistics[2], high)])
