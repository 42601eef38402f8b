"""Squared per-sample gradients of norm layers.

Where all that shares statistics fits into a program's registers, it is read once, and the statistics are taken of what
was read. Else one kernel takes the statistics, and another reads the input again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast.ops.squared_grads import accumulation_dtype
from fdcr_fast.ops.triton.elements import span
from fdcr_fast.ops.triton.launch import blocks, in_order, launch, power_of_two, splits

_ELEMENTS = 4096  # of a block of input


@triton.jit
def norm_statistics(
    input,
    mean,
    variance,
    positions,
    groups,
    channels,
    pixels,
    x_n,
    x_t,
    x_g,
    x_c,
    x_s,
    mean_group,
    mean_channel,
    GIVEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Mean, unless it is given, and mean squared distance from it, of the channels and pixels of one ``(n, t, g)``."""
    exact: tl.constexpr = variance.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    g = row % groups
    rows = input + row // groups // positions * x_n + row // groups % positions * x_t + g * x_g
    size = (channels * pixels).to(exact)
    m = tl.zeros((1, 1), exact)
    if not GIVEN:
        sums = tl.zeros((CHANNELS, PIXELS), exact)
        for c0 in range(0, channels, CHANNELS):
            c = span(c0, CHANNELS)
            for s0 in range(0, pixels, PIXELS):
                s = span(s0, PIXELS)
                mask = (c < channels)[:, None] & (s < pixels)[None, :]
                sums += tl.load(rows + (c * x_c)[:, None] + (s * x_s)[None, :], mask=mask, other=0.0).to(exact)
        m = tl.sum(tl.sum(sums, axis=1), axis=0) / size
        tl.store(mean + row, m)
        m = tl.zeros((1, 1), exact) + m
    squares = tl.zeros((CHANNELS, PIXELS), exact)
    for c0 in range(0, channels, CHANNELS):
        c = span(c0, CHANNELS)
        if GIVEN:
            m = tl.load(mean + g * mean_group + c * mean_channel, mask=c < channels, other=0.0).to(exact)[:, None]
        for s0 in range(0, pixels, PIXELS):
            s = span(s0, PIXELS)
            mask = (c < channels)[:, None] & (s < pixels)[None, :]
            x = tl.load(rows + (c * x_c)[:, None] + (s * x_s)[None, :], mask=mask, other=0.0).to(exact)
            x = tl.where(mask, x - m, 0.0)
            squares += x * x
    tl.store(variance + row, tl.sum(tl.sum(squares, axis=1), axis=0) / size)


@triton.jit
def squared_norm_grads(
    grad,
    input,
    mean,
    variance,
    weight,
    bias,
    samples,
    positions,
    channels,
    pixels,
    per_split,
    eps: tl.float64,
    g_n,
    g_t,
    g_g,
    g_c,
    g_s,
    x_n,
    x_t,
    x_g,
    x_c,
    x_s,
    mean_n,
    mean_t,
    mean_g,
    mean_c,
    variance_n,
    variance_t,
    variance_g,
    variance_c,
    OWN_MEAN: tl.constexpr,
    OWN_VARIANCE: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Statistics of its own are those of the block, which then holds all channels and pixels."""
    exact: tl.constexpr = weight.dtype.element_ty
    channel_blocks = tl.cdiv(channels, CHANNELS)
    group = (tl.program_id(0) // channel_blocks).to(tl.int64)
    c = span(tl.program_id(0) % channel_blocks * CHANNELS, CHANNELS)
    known = c < channels
    size = (channels * pixels).to(exact)
    first = tl.program_id(1) * per_split
    total_weight = tl.zeros((CHANNELS,), exact)
    total_bias = tl.zeros((CHANNELS,), exact)
    for n in range(first, tl.minimum(first + per_split, samples)):
        n = tl.cast(n, tl.int64)
        of_weight = tl.zeros((CHANNELS,), exact)
        of_bias = tl.zeros((CHANNELS,), exact)
        for t0 in range(0, positions, POSITIONS):
            t = span(t0, POSITIONS)
            rows = known[None, :] & (t < positions)[:, None]
            at = (n * mean_n + group * mean_g + t * mean_t)[:, None] + (c * mean_c)[None, :]
            if not OWN_MEAN:
                m = tl.load(mean + at, mask=rows, other=0.0).to(exact)[:, :, None]
            at = (n * variance_n + group * variance_g + t * variance_t)[:, None] + (c * variance_c)[None, :]
            if not OWN_VARIANCE:
                v = tl.load(variance + at, mask=rows, other=0.0).to(exact)[:, :, None]
            for s0 in range(0, pixels, PIXELS):
                s = span(s0, PIXELS)
                mask = rows[:, :, None] & (s < pixels)[None, None, :]
                x_at = (n * x_n + group * x_g + t * x_t)[:, None, None] + (c * x_c)[None, :, None]
                x = tl.load(input + x_at + (s * x_s)[None, None, :], mask=mask, other=0.0).to(exact)
                g_at = (n * g_n + group * g_g + t * g_t)[:, None, None] + (c * g_c)[None, :, None]
                g = tl.load(grad + g_at + (s * g_s)[None, None, :], mask=mask, other=0.0).to(exact)
                away = x - (tl.sum(tl.sum(x, axis=2), axis=1) / size)[:, None, None] if OWN_MEAN else x - m
                away = tl.where(mask, away, 0.0)
                s2 = (tl.sum(tl.sum(away * away, axis=2), axis=1) / size)[:, None, None] if OWN_VARIANCE else v
                part = tl.where(mask, g * away / tl.sqrt((s2 + eps).to(exact)), 0.0)
                of_weight += tl.sum(tl.sum(part, axis=2), axis=0)
                of_bias += tl.sum(tl.sum(g, axis=2), axis=0)
        total_weight += of_weight * of_weight
        total_bias += of_bias * of_bias
    to = (tl.program_id(1) * (tl.num_programs(0) // channel_blocks) + group) * channels + c
    tl.store(weight + to, total_weight, mask=known)
    tl.store(bias + to, total_bias, mask=known)


def _over(channels: int, pixels: int) -> tuple[int, int]:
    """Channels and pixels of a block that goes over all of them, part by part."""
    of_pixels = power_of_two(pixels, most=_ELEMENTS)
    return power_of_two(channels, most=_ELEMENTS // of_pixels), of_pixels


def block_of(input: Tensor, own: bool) -> tuple[bool, tuple[int, int, int]]:
    """Whether a block holds all that shares statistics of its own, and its channels, pixels and positions."""
    _, positions, _, channels, pixels = input.shape
    of_channels, of_pixels = _over(channels, pixels)
    held = own and of_channels >= channels and of_pixels >= pixels
    if not held:
        of_channels, of_pixels = power_of_two(channels, most=32), power_of_two(pixels, most=128)
    return held, (of_channels, of_pixels, power_of_two(positions, most=max(1, _ELEMENTS // (of_channels * of_pixels))))


def _own_statistics(input: Tensor, mean: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean, unless it is given, and variance ``[N, T, G]``."""
    samples, positions, groups, channels, pixels = input.shape
    of_channels, of_pixels = _over(channels, pixels)
    variance = input.new_empty(samples, positions, groups, dtype=dtype)
    found = torch.empty_like(variance) if mean is None else mean
    launch(
        norm_statistics,
        (variance.numel(),),
        input,
        found,
        variance,
        positions,
        groups,
        channels,
        pixels,
        *input.stride(),
        *((0, 0) if mean is None else mean.stride()),
        GIVEN=mean is not None,
        CHANNELS=of_channels,
        PIXELS=of_pixels,
    )
    return found, variance


def _strides(statistics: Tensor) -> tuple[int, ...]:
    """Along ``(n, t, g, c)`` of ``[N, T, G]`` or ``[G, C]``."""
    return (*statistics.stride(), 0) if statistics.dim() == 3 else (0, 0, *statistics.stride())


def sum_squared_grads_norm(
    grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a norm layer's scale and shift."""
    dtype = accumulation_dtype(grad_output, input)
    samples, positions, groups, channels, pixels = input.shape
    held, (of_channels, of_pixels, of_positions) = block_of(input, mean is None or variance is None)
    if not held and variance is None:
        own_mean, variance = _own_statistics(input, mean, dtype)
        mean = own_mean if mean is None else mean
    elif not held and mean is None:
        mean = input.mean((3, 4), dtype=dtype)
    tiles = groups * blocks(channels, of_channels)
    parts = splits(samples, tiles, input.device)
    weight, bias = (input.new_empty(parts, groups, channels, dtype=dtype) for _ in range(2))
    launch(
        squared_norm_grads,
        (tiles, parts),
        grad_output,
        input,
        mean,
        variance,
        weight,
        bias,
        samples,
        positions,
        channels,
        pixels,
        blocks(samples, parts),
        eps,
        *grad_output.stride(),
        *input.stride(),
        *((0,) * 4 if mean is None else _strides(mean)),
        *((0,) * 4 if variance is None else _strides(variance)),
        OWN_MEAN=mean is None,
        OWN_VARIANCE=variance is None,
        POSITIONS=of_positions,
        CHANNELS=of_channels,
        PIXELS=of_pixels,
    )
    return in_order(weight), in_order(bias)
