"""Inner products of all pairs of clients, transformed as they are read.

In float32 only: products of float64 are PyTorch's own, by way of the reference.
"""

# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.ops.ranges import check_ranges
from fdcr_fast.ops.triton.elements import product, span, tiled
from fdcr_fast.ops.triton.launch import Target, blocks, launch, power_of_two, splits, target

_STEP = 32  # parameters whose products are summed in float32


@triton.jit
def scaled(x):
    """Rows of float32 whose largest entry is in [1, 2), and the powers of two that they were divided by.

    Zeros and rows with a non-finite entry stay as they are. In two factors: one might not be a number of float32.
    """
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1).to(tl.float64)
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) - 1023
    exponent = tl.where((largest > 0) & (largest < float("inf")), exponent, 0)
    half = exponent >> 1
    first = two_to(-half).to(x.dtype)
    second = two_to(half - exponent).to(x.dtype)
    return (x * first[:, None] * second[:, None]).to(tl.float32), two_to(exponent)


@triton.jit
def two_to(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def transformed(
    updates,
    fishers,
    low,
    high,
    k,
    known,
    update_at,
    fisher_at,
    there,
    update_client,
    fisher_client,
    TRANSFORM: tl.constexpr,
):
    """Rows ``[B, V]``, and the powers of two ``[B]`` that they were divided by."""
    mask = known[:, None] & there[None, :]
    if TRANSFORM != "fourth_root_fisher":
        x = tl.load(updates + (k * update_client)[:, None] + update_at[None, :], mask=mask, other=0.0)
    if TRANSFORM != "update":
        f = tl.load(fishers + (k * fisher_client)[:, None] + fisher_at[None, :], mask=mask, other=0.0).to(tl.float32)
    if TRANSFORM == "update":
        x = x.to(tl.float32)
    elif TRANSFORM == "fisher_update":
        x = tl.sqrt_rn(f).to(tl.float64) * x.to(tl.float64)
    elif TRANSFORM == "reweighted_update":
        smallest = tl.load(low + k, mask=known, other=0.0)
        scale = tl.load(high + k, mask=known, other=1.0) - smallest
        x = (f.to(tl.float64) - smallest[:, None]) / scale[:, None] * x.to(tl.float64)
        x = tl.where(mask, x, 0.0)
    else:
        x = tl.sqrt_rn(tl.sqrt_rn(f))
    return scaled(x)


@triton.jit
def inner_products(
    updates,
    fishers,
    low,
    high,
    read,
    steps,
    partial,
    clients,
    count,
    per_split,
    length,
    update_tile,
    update_client,
    update_column,
    fisher_tile,
    fisher_client,
    fisher_column,
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CLIENTS: tl.constexpr,
    STEP: tl.constexpr,
):
    if tl.program_id(1) <= tl.program_id(0):
        i = span(tl.program_id(0).to(tl.int64) * CLIENTS, CLIENTS)
        j = span(tl.program_id(1).to(tl.int64) * CLIENTS, CLIENTS)
        i_known = tl.load(read + i, mask=i < clients, other=0) != 0
        j_known = tl.load(read + j, mask=j < clients, other=0) != 0
        first = tl.program_id(2) * per_split
        total = tl.zeros((CLIENTS, CLIENTS), tl.float64)
        for step in range(first, tl.minimum(first + per_split, count)):
            start = tl.load(steps + 2 * step)
            if ALIGNED:
                start = tl.multiple_of(start, 16)
            v = span(start, STEP)
            stop = tl.load(steps + 2 * step + 1)
            if ALIGNED:
                stop = tl.multiple_of(stop, 16)
            there = v < stop
            update_at = tiled(v, length, update_tile, update_column, TILED)
            fisher_at = tiled(v, length, fisher_tile, fisher_column, TILED)
            x, x_size = transformed(
                updates, fishers, low, high, i, i_known, update_at, fisher_at, there,
                update_client, fisher_client, TRANSFORM,
            )  # fmt: skip
            y, y_size = transformed(
                updates, fishers, low, high, j, j_known, update_at, fisher_at, there,
                update_client, fisher_client, TRANSFORM,
            )  # fmt: skip
            products = product(x, tl.trans(y), tl.zeros((CLIENTS, CLIENTS), tl.float32), "tf32x3")
            total += products.to(tl.float64) * x_size[:, None] * y_size[None, :]
        to = (tl.program_id(2).to(tl.int64) * clients + i[:, None]) * clients + j[None, :]
        tl.store(partial + to, total, mask=(i < clients)[:, None] & (j < clients)[None, :])


def clients_of(clients: int, device: Target) -> int:
    """How many clients a tile has on each side."""
    return power_of_two(clients, least=16, most=64 if device.capability >= 90 else 32)


def count_of(ranges: Tensor) -> int:
    """How many pieces of at most :data:`_STEP` parameters ranges ``[R, 2]`` are cut into."""
    return int(_counts(ranges).sum())


def steps_of(ranges: Tensor, device: torch.device) -> Tensor:
    """These pieces ``[count, 2]``, cut on a device to which only the ranges travel."""
    count = count_of(ranges)
    ranges = ranges.to(device, non_blocking=True)
    counts = _counts(ranges)
    of_range = torch.repeat_interleave(counts, output_size=count)  # or the host would wait for the sum
    first = counts.cumsum(0) - counts
    starts = ranges[of_range, 0] + (torch.arange(count, device=device) - first[of_range]) * _STEP
    return torch.stack([starts, torch.minimum(starts + _STEP, ranges[of_range, 1])], 1)


def _counts(ranges: Tensor) -> Tensor:
    return (ranges[:, 1] - ranges[:, 0] + _STEP - 1) // _STEP


def gram(
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    read: Tensor,
    transforms: Sequence[str],
    ranges: Sequence[Tensor],
    total: Tensor,
    num_params: int,
    single: bool,
) -> Tensor:
    """Inner products of transformed clients."""
    if not single or torch.float64 in (updates.dtype, updates.dtype if fishers is None else fishers.dtype):
        return ops.gram.reference(
            updates, fishers, fisher_min, fisher_max, read, transforms, ranges, total, num_params, single
        )
    check_ranges(ranges, num_params)
    tiles, clients, length = updates.shape
    of_clients = clients_of(clients, target(updates.device))
    edge = blocks(clients, of_clients)
    known = read.to(updates.device, non_blocking=True)
    result = total.clone(memory_format=torch.contiguous_format)
    for view, (transform, selected) in enumerate(zip(transforms, ranges, strict=True)):
        count = count_of(selected)
        parts = splits(count, edge * (edge + 1) // 2, updates.device)
        partial = updates.new_zeros(parts, clients, clients, dtype=torch.float64)
        launch(
            inner_products,
            (edge, edge, parts),
            updates,
            fishers,
            fisher_min,
            fisher_max,
            known.view(torch.uint8),
            steps_of(selected, updates.device),
            partial,
            clients,
            count,
            blocks(count, parts),
            length,
            *updates.stride(),
            *(updates if fishers is None else fishers).stride(),
            TILED=tiles > 1,
            ALIGNED=bool((selected % 16 == 0).all()),
            TRANSFORM=transform,
            CLIENTS=of_clients,
            STEP=_STEP,
            num_warps=8 if of_clients == 64 else 4,
            maxnreg=255,  # or ptxas settles for fewer, and spills
        )
        lower = partial.sum(0).tril()
        result[view] += lower + lower.tril(-1).t()
    return result.masked_fill_(~(known & known[:, None]), torch.nan)
