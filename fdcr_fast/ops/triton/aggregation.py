"""Discrepancy and rescaled mean: one kernel that computes either or both from one reading of the clients.

A program reads a block of columns of all clients twice: once for the mean over the clients, once for the distances to
it. Up to :data:`_HELD` clients the block stays in registers. Of more clients, the second reading finds the block in the
cache that all programs share: blocks are 16 columns wide, and one program runs on each multiprocessor, which makes 17
kilobytes for each client of 132 multiprocessors in float32. Beyond about 2000 clients of an H100, it is read twice.
"""

# ruff: noqa: D103

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast.ops.triton.elements import rounded, span, tiled
from fdcr_fast.ops.triton.launch import Target, blocks, launch, power_of_two, target

GROUP = 16  # clients whose products are summed in float32 where products are; sums of more are float64
_HELD = 128
_ELEMENTS = 2048  # of one matrix in a block; half of that where products are float64
_CHUNK = 4096  # columns whose sums one program forms
_WARPS = 8
_REGISTERS = 128  # at most, of a thread: two programs per multiprocessor, and no spills for the sake of three


@dataclass(frozen=True)
class Block:
    """Shape of what a program holds at a time.

    Attributes:
        groups: How many groups of :data:`GROUP` clients.
        columns: How many parameters.
        held: Whether these are all clients, so that every number is read once into registers.
        programs: How many may run side by side.
    """

    groups: int
    columns: int
    held: bool
    programs: int


def block_of(clients: int, double: bool, device: Target) -> Block:
    """The block for so many clients, whose products are formed in float64 or not."""
    groups = power_of_two(blocks(clients, GROUP), most=_HELD // GROUP)
    columns = _ELEMENTS // (2 if double else 1) // (GROUP * groups)
    held = clients <= _HELD
    return Block(groups, columns, held, 1 << 30 if held else device.multiprocessors)


@triton.jit
def half_tanh(x):
    """``tanh(x / 2)`` for x in [0, 1], by the polynomial of csrc/half_tanh.h."""
    y = x * x
    if x.dtype == tl.float64:
        p = y * -2.7987532117168755e-10 + 4.161635317217189e-09
        p = p * y - 4.4047370446504587e-08
        p = p * y + 4.3822864428950054e-07
        p = p * y - 4.3276377855561695e-06
        p = p * y + 4.271381463014264e-05
        p = p * y - 0.00042162697952141247
        p = p * y + 0.0041666666663085945
        p = p * y - 0.04166666666665585
        p = p * y + 0.49999999999999994
    else:
        p = y * 3.345965888001956e-05 - 0.00041393935680389404
        p = p * y + 0.004163984674960375
        p = p * y - 0.041666336357593536
        p = p * y + 0.5
    return x * p


@triton.jit
def over_clients(x):
    """Sums ``[C]`` of ``[G, 16, C]`` in float64, over the clients of a group in the type of ``x``."""
    return tl.sum(tl.sum(x, axis=1).to(tl.float64), axis=0)


@triton.jit
def over_columns(x):
    """Sums ``[G, 16]`` of ``[G, 16, C]`` in float64, over a block of columns in the type of ``x``."""
    return tl.sum(x, axis=2).to(tl.float64)


@triton.jit
def clients_of_group(first, alpha, weights, clients, SCORE: tl.constexpr, MEAN: tl.constexpr, GROUPS: tl.constexpr):
    """Numbers ``[G, 16]`` of the clients from ``first`` on, and their weights in the scores' mean and in the result."""
    k = span(first, GROUPS * 16).reshape(GROUPS, 16)
    share = tl.zeros((GROUPS, 16), tl.float64)
    weight = share
    if SCORE:
        share = tl.load(alpha + k, mask=k < clients, other=0.0)
    if MEAN:
        weight = tl.load(weights + k, mask=k < clients, other=0.0)
    return k, share, weight


@triton.jit
def read_clients(
    updates,
    fishers,
    low,
    high,
    k,
    read,
    update_at,
    fisher_at,
    within,
    there,
    update_stride,
    fisher_stride,
    FISHERS: tl.constexpr,
    exact: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Updates and importances ``[G, 16, C]``: zeros where nothing is read, and behind the last parameter."""
    mask = read[:, :, None] & within[None, None, :]
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    at = (k * update_stride)[:, :, None] + update_at[None, None, :]
    x = tl.load(updates + at, mask=mask, other=0.0, eviction_policy=policy).to(exact)
    x = tl.where(there[None, None, :], x, 0.0)
    if FISHERS:
        smallest = tl.load(low + k, mask=read, other=0.0)
        scale = 1.0 / (tl.load(high + k, mask=read, other=1.0) - smallest)
        at = (k * fisher_stride)[:, :, None] + fisher_at[None, None, :]
        f = tl.load(fishers + at, mask=mask, other=0.0, eviction_policy=policy).to(exact)
        f = (f - smallest.to(exact)[:, :, None]) * scale.to(exact)[:, :, None]
        f = tl.where(there[None, None, :], f, 0.0)
    else:
        f = x
    return x, f


@triton.jit
def aggregate(
    updates,
    fishers,
    low,
    high,
    alpha,
    weights,
    global_params,
    result,
    partial,
    clients,
    parameters,
    chunks,
    length,
    columns,
    limit,
    update_tile,
    update_client,
    update_column,
    fisher_tile,
    fisher_client,
    fisher_column,
    global_stride,
    TILED: tl.constexpr,
    FISHERS: tl.constexpr,
    SCORE: tl.constexpr,
    REWEIGHT: tl.constexpr,
    MEAN: tl.constexpr,
    RESCALE: tl.constexpr,
    DOUBLE: tl.constexpr,
    HELD: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    exact: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    step: tl.constexpr = GROUPS * 16
    for chunk in range(tl.program_id(0).to(tl.int64), chunks, tl.num_programs(0)):
        first = chunk * CHUNK
        sums = partial + chunk * (2 * clients + 1)
        distance = tl.zeros((GROUPS, 16), tl.float64)
        norm = tl.zeros((GROUPS, 16), tl.float64)
        mean_square = tl.zeros((COLUMNS,), tl.float64)
        for start in range(first, tl.minimum(first + CHUNK, parameters), COLUMNS):
            v = span(start, COLUMNS)
            there = v < parameters
            within = v < columns
            update_at = tiled(v, length, update_tile, update_column, TILED)
            fisher_at = tiled(v, length, fisher_tile, fisher_column, TILED)
            mean = tl.zeros((COLUMNS,), tl.float64)
            moved = tl.zeros((COLUMNS,), tl.float64)
            for group in range(0, clients, step):
                k, share, weight = clients_of_group(group, alpha, weights, clients, SCORE, MEAN, GROUPS)
                read = (share != 0) | (weight != 0)
                x, f = read_clients(
                    updates, fishers, low, high, k, read, update_at, fisher_at, within, there,
                    update_client, fisher_client, FISHERS, exact, not HELD,
                )  # fmt: skip
                if SCORE:
                    u = x
                    if REWEIGHT:
                        u = f * x
                    part = tl.where((share != 0)[:, :, None], share.to(exact)[:, :, None] * u, 0.0)
                    mean += over_clients(part)
                if MEAN:
                    y = x
                    if RESCALE:
                        y = x + half_tanh(f) * x
                    part = tl.where((weight != 0)[:, :, None], weight.to(exact)[:, :, None] * y, 0.0)
                    moved += over_clients(part)
                if SCORE and HELD:
                    away = mean.to(exact)[None, None, :] - u
                    distance += over_columns(away * away)
                    norm += over_columns(x * x)
            if SCORE:
                mean_square += mean * mean
                if not HELD:
                    for group in range(0, clients, step):
                        k, share, weight = clients_of_group(group, alpha, weights, clients, SCORE, False, GROUPS)
                        read = share != 0
                        x, f = read_clients(
                            updates, fishers, low, high, k, read, update_at, fisher_at, within, there,
                            update_client, fisher_client, REWEIGHT, exact, False,
                        )  # fmt: skip
                        u = x
                        if REWEIGHT:
                            u = f * x
                        away = mean.to(exact)[None, None, :] - u
                        known = read & (start > first)
                        before = tl.load(sums + k, mask=known, other=0.0)
                        tl.store(sums + k, before + over_columns(away * away), mask=k < clients)
                        before = tl.load(sums + clients + k, mask=known, other=0.0)
                        tl.store(sums + clients + k, before + over_columns(x * x), mask=k < clients)
                    tl.debug_barrier()  # what one thread has stored, another will load
            if MEAN:
                w = tl.load(global_params + v * global_stride, mask=there, other=0.0).to(tl.float64) + moved
                w = tl.where(w > limit, limit, tl.where(w < -limit, -limit, w))
                tl.store(result + v, rounded(w, result.dtype.element_ty), mask=there)
        if SCORE:
            tl.store(sums + 2 * clients, tl.sum(mean_square, axis=0))
            if HELD:
                k = span(0, step).reshape(GROUPS, 16)
                tl.store(sums + k, distance, mask=k < clients)
                tl.store(sums + clients + k, norm, mask=k < clients)


def _aggregate(
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    num_params: int,
    single: bool,
    *,
    global_params: Tensor | None = None,
    weights: Tensor | None = None,
    alpha: Tensor | None = None,
    totals: Tensor | None = None,
    reweight: bool = False,
    rescale: bool = False,
) -> tuple[Tensor, Tensor]:
    """The new totals, if there are ``alpha`` and ``totals``, and parameters, if there are ``weights``."""
    tiles, clients, length = updates.shape
    if not (reweight or rescale):
        fishers = None
    block = block_of(clients, not single, target(updates.device))
    chunks = blocks(num_params, _CHUNK)
    partial = updates.new_empty(chunks if alpha is not None else 0, 2 * clients + 1, dtype=torch.float64)
    wanted = updates.new_empty(0) if global_params is None else global_params
    result = torch.empty_like(wanted, memory_format=torch.contiguous_format)
    launch(
        aggregate,
        (min(chunks, block.programs),),
        updates,
        fishers,
        None if fisher_min is None else fisher_min.contiguous(),
        None if fisher_max is None else fisher_max.contiguous(),
        None if alpha is None else alpha.contiguous(),
        None if weights is None else weights.contiguous(),
        global_params,
        result,
        partial,
        clients,
        num_params,
        chunks,
        length,
        tiles * length,
        torch.finfo(wanted.dtype).max,
        *updates.stride(),
        *(updates if fishers is None else fishers).stride(),
        *wanted.stride(),
        TILED=tiles > 1,
        FISHERS=fishers is not None,
        SCORE=alpha is not None,
        REWEIGHT=reweight,
        MEAN=weights is not None,
        RESCALE=rescale,
        DOUBLE=not single,
        HELD=block.held,
        GROUPS=block.groups,
        COLUMNS=block.columns,
        CHUNK=_CHUNK,
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
    )
    if alpha is None or totals is None:
        return partial, result
    totals = totals + partial.sum(0)
    unread = (alpha == 0).repeat(2)
    totals[: 2 * clients].masked_fill_(unread, torch.nan)
    return totals, result


def discrepancy(
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    alpha: Tensor,
    totals: Tensor,
    num_params: int,
    single: bool,
) -> Tensor:
    """Sums of squared distances to the mean reweighted update."""
    given = updates, fishers, fisher_min, fisher_max, num_params, single
    return _aggregate(*given, alpha=alpha, totals=totals, reweight=fishers is not None)[0]


def rescaled_mean(
    global_params: Tensor,
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    weights: Tensor,
    single: bool,
) -> Tensor:
    """Weighted mean of rescaled updates, added to the global parameters."""
    given = updates, fishers, fisher_min, fisher_max, global_params.numel(), single
    return _aggregate(*given, global_params=global_params, weights=weights, rescale=fishers is not None)[1]


def discrepancy_and_mean(
    global_params: Tensor,
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    alpha: Tensor,
    weights: Tensor,
    totals: Tensor,
    reweight: bool,
    rescale: bool,
    single: bool,
) -> tuple[Tensor, Tensor]:
    """Scores and the new global parameters from one reading."""
    return _aggregate(
        updates,
        fishers,
        fisher_min,
        fisher_max,
        global_params.numel(),
        single,
        global_params=global_params,
        weights=weights,
        alpha=alpha,
        totals=totals,
        reweight=reweight,
        rescale=rescale,
    )
