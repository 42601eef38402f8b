"""The mean of the central values of every parameter, over the clients.

Up to :data:`_SORTED` clients a thread holds all values of its parameters in registers, and a sorting network without
branches orders them, as on the CPU. Of more clients, the smallest and the largest of the central values are found by
bisection, bit by bit from the highest: each step counts the values below a threshold. Values are read once and held up
to :data:`_HELD` clients; of more, each step reads them from the cache that all programs share. What lies between the
two is summed as integers, in units of 2^-52 of the larger one or less for up to 1000 clients: exactly, so in any order.
Steps take 4 operations a value, 32 times (float64: 64): counting, not memory, sets the pace.

The mean around the median of more than :data:`_SORTED` clients is PyTorch's sort, by way of the reference.
"""

# ruff: noqa: D103

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.ops.central import check_keep
from fdcr_fast.ops.triton.elements import rounded, span, tiled
from fdcr_fast.ops.triton.gram import two_to
from fdcr_fast.ops.triton.launch import blocks, launch, power_of_two

_SORTED = 32  # clients; a network for 64 takes half a minute to compile
_REGISTERS = 128  # of a thread, for values
_WARPS = 4
_HELD = 512
_COLUMNS = 32  # of a program that selects, at a time: 128 bytes of every row
_CHUNK = 256  # in all


@triton.constexpr_function
def partner(i, block, apart, rows):
    """The row that row ``i`` is compared with when halves of ``block`` rows are merged, or ``i`` itself (Batcher)."""

    def is_first(m):
        inside = m // (2 * block) == (m + apart) // (2 * block) and m + apart < rows
        return m >= apart % block and (m - apart % block) % (2 * apart) < apart and inside

    if is_first(i):
        return i + apart
    return i - apart if i >= apart and is_first(i - apart) else i


@triton.jit
def in_order(xs, LOG: tl.constexpr):
    """A tuple of ``2^LOG`` blocks, each element sorted over the tuple by odd-even merges."""
    for p in tl.static_range(LOG):
        for q in tl.static_range(p + 1):
            ys = xs[:0]
            for i in tl.static_range(len(xs)):
                if partner(i, 1 << p, 1 << (p - q), len(xs)) > i:
                    ys = ys + (tl.minimum(xs[i], xs[partner(i, 1 << p, 1 << (p - q), len(xs))]),)  # noqa: RUF005
                elif partner(i, 1 << p, 1 << (p - q), len(xs)) < i:
                    ys = ys + (tl.maximum(xs[i], xs[partner(i, 1 << p, 1 << (p - q), len(xs))]),)  # noqa: RUF005
                else:
                    ys = ys + (xs[i],)  # noqa: RUF005
            xs = ys
    return xs


@triton.jit
def shifted(xs, by, behind, LOG: tl.constexpr):
    """``xs[i + by]`` for every ``i``, and ``behind`` for what lies beyond: one step for each bit of ``by``."""
    for bit in tl.static_range(LOG):
        ys = xs[:0]
        for i in tl.static_range(len(xs)):
            if i + (1 << bit) < len(xs):
                ys = ys + (tl.where((by >> bit) & 1 != 0, xs[i + (1 << bit)], xs[i]),)  # noqa: RUF005
            else:
                ys = ys + (tl.where((by >> bit) & 1 != 0, behind, xs[i]),)  # noqa: RUF005
        xs = ys
    return xs


@triton.jit
def write(total, keep, global_params, result, v, parameters, limit, global_stride):
    there = v < parameters
    w = tl.load(global_params + v * global_stride, mask=there, other=0.0).to(tl.float64) + total / keep
    w = tl.where(w > limit, limit, tl.where(w < -limit, -limit, w))
    tl.store(result + v, rounded(w, result.dtype.element_ty), mask=there)


@triton.jit
def sorted_mean(
    updates,
    rows,
    global_params,
    result,
    read,
    keep,
    parameters,
    length,
    columns,
    limit,
    tile_stride,
    client_stride,
    column_stride,
    global_stride,
    TILED: tl.constexpr,
    NEAREST: tl.constexpr,
    LOG: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if updates.dtype.element_ty == tl.float64 else tl.float32
    v = span(tl.program_id(0).to(tl.int64) * COLUMNS, COLUMNS)
    at = tiled(v, length, tile_stride, column_stride, TILED)
    none = tl.full((COLUMNS,), float("inf"), exact)
    xs = ()
    for i in tl.static_range(1 << LOG):
        row = tl.load(rows + i, mask=i < read, other=0)
        x = tl.load(updates + row * client_stride + at, mask=(v < columns) & (i < read), other=0.0)
        xs = xs + (tl.where(i < read, x.to(exact), none),)  # type: ignore[assignment]  # noqa: RUF005
    xs = in_order(xs, LOG)
    first = tl.zeros((COLUMNS,), tl.int32)
    if NEAREST:
        twice = tl.zeros((COLUMNS,), tl.float64)
        for i in tl.static_range(1 << LOG):
            twice += tl.where(i == (read - 1) // 2, xs[i], 0.0).to(tl.float64)
            twice += tl.where(i == read // 2, xs[i], 0.0).to(tl.float64)
        ys = shifted(xs, keep, none, LOG)
        for i in tl.static_range(1 << LOG):  # as many windows lie further down than the nearest one
            further = twice > xs[i].to(tl.float64) + ys[i].to(tl.float64)
            first += (further & (i + keep < read)).to(tl.int32)
    else:
        first += (read - keep) // 2
    total = tl.zeros((COLUMNS,), tl.float64)
    for i in tl.static_range(1 << LOG):
        total += tl.where((i >= first) & (i < first + keep), xs[i], 0.0).to(tl.float64)
    write(total, keep, global_params, result, v, parameters, limit, global_stride)


@triton.jit
def keys(x):
    """Unsigned integers in the order of the numbers."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return (bits ^ ((bits >> 63) | -0x8000000000000000)).to(tl.uint64, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def number(key):
    """The number of a key, in float64."""
    if key.dtype == tl.uint64:
        bits = key.to(tl.int64, bitcast=True)
        return (bits ^ (~(bits >> 63) | -0x8000000000000000)).to(tl.float64, bitcast=True)
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def group_of(updates, rows, first, read, at, within, client_stride, exact: tl.constexpr, ROWS: tl.constexpr):
    """Values ``[ROWS, C]`` of the clients from the ``first`` on, and which of them are there."""
    k = span(first, ROWS)
    known = (k < read)[:, None] & within[None, :]
    row = tl.load(rows + k, mask=k < read, other=0)
    x = tl.load(updates + (row * client_stride)[:, None] + at[None, :], mask=known, other=0.0)
    return x.to(exact), known


@triton.jit
def below(x, known, low, high):
    """How many keys lie below each of two thresholds."""
    key = keys(x)
    below_low = tl.sum((known & (key < low[None, :])).to(tl.int32), axis=0)
    return below_low, tl.sum((known & (key < high[None, :])).to(tl.int32), axis=0)


@triton.jit
def between(x, known, low, high, half, rest):
    """The sum of what lies between two keys, times ``2^(half + rest)``, in integers."""
    key = keys(x)
    units = x.to(tl.float64) * two_to(half)[None, :] * two_to(rest)[None, :]
    inside = known & (key > low[None, :]) & (key < high[None, :])
    return tl.sum(tl.where(inside, tl.floor(units + 0.5), 0.0).to(tl.int64), axis=0)


@triton.jit
def selected_mean(
    updates,
    rows,
    global_params,
    result,
    read,
    keep,
    spare,
    parameters,
    length,
    columns,
    limit,
    tile_stride,
    client_stride,
    column_stride,
    global_stride,
    TILED: tl.constexpr,
    HELD: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    unsigned: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    chunk = tl.program_id(0).to(tl.int64) * CHUNK
    low_rank = (read - keep) // 2
    high_rank = low_rank + keep - 1
    for start in range(chunk, tl.minimum(chunk + CHUNK, parameters), COLUMNS):
        v = span(start, COLUMNS)
        within = v < columns
        at = tiled(v, length, tile_stride, column_stride, TILED)
        x, known = group_of(updates, rows, 0, read, at, within, client_stride, exact, ROWS)
        # The largest keys that no more values lie below than have a lower rank: those of the values of that rank.
        low = tl.zeros((COLUMNS,), unsigned)
        high = low
        bit = tl.full((COLUMNS,), 1 << (BITS - 1), unsigned)
        for _ in range(BITS):
            below_low, below_high = below(x, known, low | bit, high | bit)
            if not HELD:
                for first in range(ROWS, read, ROWS):
                    y, there = group_of(updates, rows, first, read, at, within, client_stride, exact, ROWS)
                    more_low, more_high = below(y, there, low | bit, high | bit)
                    below_low += more_low
                    below_high += more_high
            low = tl.where(below_low <= low_rank, low | bit, low)
            high = tl.where(below_high <= high_rank, high | bit, high)
            bit = bit >> 1
        smallest, largest = number(low), number(high)
        size = tl.maximum(tl.abs(smallest), tl.abs(largest))
        exponent = spare - 1 - (((size.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023)
        half = exponent >> 1
        after_low, below_high = below(x, known, low + 1, high)
        inside = between(x, known, low, high, half, exponent - half)
        if not HELD:
            for first in range(ROWS, read, ROWS):
                y, there = group_of(updates, rows, first, read, at, within, client_stride, exact, ROWS)
                more_low, more_high = below(y, there, low + 1, high)
                after_low += more_low
                below_high += more_high
                inside += between(y, there, low, high, half, exponent - half)
        total = inside.to(tl.float64) * two_to(-half) * two_to(half - exponent)
        total += (after_low - low_rank).to(tl.float64) * smallest
        total += (high_rank + 1 - below_high).to(tl.float64) * largest
        total = tl.where(low == high, keep * smallest, total)
        write(total, keep, global_params, result, v, parameters, limit, global_stride)


def columns_of(clients: int, itemsize: int, nearest: bool) -> int:
    """How many parameters a program sorts: 128 bits of a row for each thread, or fewer where registers are scarce."""
    values = power_of_two(clients) * (2 if itemsize == 8 else 1) * (2 if nearest else 1)
    return 32 * _WARPS * max(1, min(16 // itemsize, _REGISTERS // values))


def central_mean(global_params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> Tensor:
    """The middle of every parameter over the clients, added to the global parameters."""
    rows = read.nonzero().flatten()
    clients = len(rows)
    if nearest and clients > _SORTED:
        return ops.central_mean.reference(global_params, updates, read, keep, nearest)
    check_keep(keep, clients, nearest)
    result = torch.empty_like(global_params, memory_format=torch.contiguous_format)
    tiles, _, length = updates.shape
    arguments = (
        result.numel(),
        length,
        tiles * length,
        torch.finfo(result.dtype).max,
        *updates.stride(),
        *global_params.stride(),
    )
    rows = rows.to(updates.device, non_blocking=True)
    if clients <= _SORTED:
        columns = columns_of(clients, updates.element_size(), nearest)
        launch(
            sorted_mean,
            (blocks(result.numel(), columns),),
            updates,
            rows,
            global_params,
            result,
            clients,
            keep,
            *arguments,
            TILED=tiles > 1,
            NEAREST=nearest,
            LOG=power_of_two(clients).bit_length() - 1,
            COLUMNS=columns,
            num_warps=_WARPS,
        )
    else:
        launch(
            selected_mean,
            (blocks(result.numel(), _CHUNK),),
            updates,
            rows,
            global_params,
            result,
            clients,
            keep,
            62 - clients.bit_length(),
            *arguments,
            TILED=tiles > 1,
            HELD=clients <= _HELD,
            BITS=64 if updates.dtype == torch.float64 else 32,
            ROWS=power_of_two(clients, most=_HELD),
            COLUMNS=_COLUMNS,
            CHUNK=_CHUNK,
            num_warps=8,
        )
    return result
