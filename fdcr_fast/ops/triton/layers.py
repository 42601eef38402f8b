"""Squared per-sample gradients of linear layers and convolutions: one kernel, in which a linear layer is a convolution.

A program owns a tile of the weight. For each of its samples it forms that tile of the sample's gradient by matrix
products over the positions, squares it where it stands, in registers, and adds it. Windows of a convolution are
gathered while they are loaded (implicit im2col). Nothing grows with samples times parameters.

In float32 only: products of float64 are PyTorch's own, by way of the reference.

Where there is one position, ``(g x)^2 = g^2 x^2``: the samples become the positions of one matrix product of squares.
"""

# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.ops.squared_grads import accumulation_dtype
from fdcr_fast.ops.triton.elements import product
from fdcr_fast.ops.triton.launch import Target, blocks, in_order, launch, power_of_two, splits, target


@triton.jit
def within(at, kernel_at, stride, dilation, padding, size):
    """Whether places of the kernel lie inside the input for output positions, ``[S, J]``, in one dimension."""
    place = (at * stride - padding)[:, None] + (kernel_at * dilation)[None, :]
    return (place >= 0) & (place < size)


@triton.jit
def squared_grads(
    grad,
    input,
    partial,
    samples,
    positions,
    per_split,
    groups,
    outs,
    columns,
    channels,
    grad_sample,
    grad_out,
    grad_position,
    input_sample,
    input_channel,
    row_0,
    row_1,
    row_2,
    place_0,
    place_1,
    place_2,
    origin,
    out_1,
    out_2,
    kernel_0,
    kernel_1,
    kernel_2,
    stride_0,
    stride_1,
    stride_2,
    dilation_0,
    dilation_1,
    dilation_2,
    padding_0,
    padding_1,
    padding_2,
    size_0,
    size_1,
    size_2,
    DIMS: tl.constexpr,
    PADDED: tl.constexpr,
    SQUARED: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    out_tiles = tl.cdiv(outs, OUTS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    j = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    o = tl.program_id(0) // column_tiles % out_tiles * OUTS + tl.arange(0, OUTS)
    group = (tl.program_id(0) // column_tiles // out_tiles).to(tl.int64)
    split = tl.program_id(1)
    begin = split * per_split
    if SQUARED:
        first, last, first_position, last_position = 0, 1, begin, tl.minimum(begin + per_split, positions)
    else:
        first, last, first_position, last_position = begin, tl.minimum(begin + per_split, samples), 0, positions

    at_2 = j % kernel_2
    at_1 = j // kernel_2 % kernel_1
    at_0 = j // kernel_2 // kernel_1 % kernel_0
    channel = group * channels + j // kernel_2 // kernel_1 // kernel_0
    place = channel * input_channel + at_0 * place_0 + at_1 * place_1 + at_2 * place_2 - origin
    out = group * outs + o
    total = tl.zeros((OUTS, COLUMNS), tl.float32)
    for n in range(first, last):
        of_grad = grad + tl.cast(n, tl.int64) * grad_sample + (out * grad_out)[:, None]
        of_input = input + tl.cast(n, tl.int64) * input_sample + place[None, :]
        of_sample = tl.zeros((OUTS, COLUMNS), tl.float32)
        for start in range(first_position, last_position, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            s_2 = s
            row = s.to(tl.int64) * row_2
            inside = (s < last_position)[:, None] & (j < columns)[None, :]
            if DIMS > 1:
                s_2 = s % out_2
                s_1 = s // out_2
                if DIMS > 2:
                    s_1 = s // out_2 % out_1
                    s_0 = s // out_2 // out_1
                    row = s_0.to(tl.int64) * row_0 + s_1.to(tl.int64) * row_1 + s_2.to(tl.int64) * row_2
                    if PADDED:
                        inside &= within(s_0, at_0, stride_0, dilation_0, padding_0, size_0)
                else:
                    row = s_1.to(tl.int64) * row_1 + s_2.to(tl.int64) * row_2
                if PADDED:
                    inside &= within(s_1, at_1, stride_1, dilation_1, padding_1, size_1)
            if PADDED:
                inside &= within(s_2, at_2, stride_2, dilation_2, padding_2, size_2)
            mask = (o < outs)[:, None] & (s < last_position)[None, :]
            g = tl.load(of_grad + (s.to(tl.int64) * grad_position)[None, :], mask=mask, other=0.0)
            x = tl.load(of_input + row[:, None], mask=inside, other=0.0)
            if SQUARED:
                g = g.to(tl.float32)
                x = x.to(tl.float32)
                g = g * g
                x = x * x
            of_sample = product(g, x, of_sample, PRECISION)
        if SQUARED:
            total += of_sample
        else:
            total += of_sample * of_sample
    to = ((split.to(tl.int64) * groups + group) * outs + o) * columns
    tl.store(partial + to[:, None] + j[None, :], total, mask=(o < outs)[:, None] & (j < columns)[None, :])


@triton.jit
def squared_sums(
    grad,
    partial,
    samples,
    positions,
    per_split,
    outs,
    grad_sample,
    grad_out,
    grad_position,
    OUTS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    first = tl.program_id(1) * per_split
    total = tl.zeros((OUTS,), tl.float32)
    for n in range(first, tl.minimum(first + per_split, samples)):
        rows = grad + tl.cast(n, tl.int64) * grad_sample + (o.to(tl.int64) * grad_out)[:, None]
        sums = tl.zeros((OUTS, POSITIONS), tl.float32)
        for start in range(0, positions, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            mask = (o < outs)[:, None] & (s < positions)[None, :]
            sums += tl.load(rows + (s.to(tl.int64) * grad_position)[None, :], mask=mask, other=0.0).to(tl.float32)
        of_sample = tl.sum(sums, axis=1)
        total += of_sample * of_sample
    tl.store(partial + tl.program_id(1).to(tl.int64) * outs + o, total, mask=o < outs)


def bias_tile_of(outs: int, positions: int) -> tuple[int, int]:
    """Sizes of a program's block: output channels, and positions at a time."""
    of_positions = power_of_two(positions, most=128)
    return power_of_two(outs, most=2048 // of_positions), of_positions


def _bias(grad: Tensor) -> Tensor:
    """``sum_n (sum_s grad[n, o, s])^2``."""
    samples, outs, positions = grad.shape
    of_outs, of_positions = bias_tile_of(outs, positions)
    parts = splits(samples, blocks(outs, of_outs), grad.device)
    partial = grad.new_empty(parts, outs, dtype=torch.float32)
    launch(
        squared_sums,
        (blocks(outs, of_outs), parts),
        grad,
        partial,
        samples,
        positions,
        blocks(samples, parts),
        outs,
        *grad.stride(),
        OUTS=of_outs,
        POSITIONS=of_positions,
    )
    return in_order(partial)


def _precision() -> str:
    """How products of float32 are formed: by three of TF32, or one where PyTorch's own matrix products may be so."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile_of(outs: int, columns: int, positions: int, device: Target) -> tuple[int, int, int]:
    """Sizes of a program's block: output channels and columns of the weight, and positions at a time."""
    return (
        power_of_two(outs, least=16, most=64),
        power_of_two(columns, least=16, most=64 if device.capability >= 90 else 32),
        power_of_two(positions, least=16, most=32),
    )


def _weight(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``[O, C / groups * kernel]`` from ``grad [N, O, *output]`` and ``input [N, C, *size]``."""
    # Everything in three dimensions, of which the first may be of size 1.
    dims = len(kernel)
    missing = 3 - dims
    out_shape = [1] * missing + list(grad.shape[2:])
    kernel, stride, dilation = ([1] * missing + list(x) for x in (kernel, stride, dilation))
    padding, size = [0] * missing + list(padding), [1] * missing + list(input.shape[2:])
    place = [0] * missing + list(input.stride()[2:])
    origin = sum(p * x for p, x in zip(padding, place, strict=True))
    row = [t * x for t, x in zip(stride, place, strict=True)]
    place = [d * x for d, x in zip(dilation, place, strict=True)]
    grad = grad.flatten(2)
    samples, positions, sample_strides = len(grad), grad.shape[2], [grad.stride(0), input.stride(0)]
    outs, channels = grad.shape[1] // groups, input.shape[1] // groups
    columns = channels * kernel[0] * kernel[1] * kernel[2]
    position_stride = grad.stride(2)
    squared = positions == 1
    if squared:
        samples, positions = 1, len(grad)
        out_shape[2], stride = positions, [0, 0, 0]
        position_stride, row[2] = sample_strides
    of_outs, of_columns, of_positions = tile_of(outs, columns, positions, target(input.device))
    tiles = groups * blocks(outs, of_outs) * blocks(columns, of_columns)
    parts = splits(blocks(positions, of_positions) if squared else samples, tiles, grad.device)
    per_split = blocks(blocks(positions, of_positions), parts) * of_positions if squared else blocks(samples, parts)
    partial = grad.new_empty(parts, groups * outs, columns, dtype=torch.float32)
    launch(
        squared_grads,
        (tiles, parts),
        grad,
        input,
        partial,
        samples,
        positions,
        per_split,
        groups,
        outs,
        columns,
        channels,
        sample_strides[0],
        grad.stride(1),
        position_stride,
        sample_strides[1],
        input.stride(1),
        *row,
        *place,
        origin,
        *out_shape[1:],
        *kernel,
        *stride,
        *dilation,
        *padding,
        *size,
        DIMS=dims,
        PADDED=any(padding),
        SQUARED=squared,
        PRECISION=_precision(),
        OUTS=of_outs,
        COLUMNS=of_columns,
        POSITIONS=of_positions,
        num_warps=8 if of_outs * of_columns >= 2048 else 4,
    )
    return in_order(partial)


def sum_squared_grads_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a linear layer."""
    if accumulation_dtype(grad_output, input) == torch.float64:
        return ops.sum_squared_grads_linear.reference(grad_output, input)
    grad, input = grad_output.transpose(1, 2), input.transpose(1, 2)
    return _weight(grad, input, (1,), (1,), (0,), (1,), 1), _bias(grad)


def sum_squared_grads_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a convolution."""
    geometry = kernel_size, stride, padding, dilation, groups
    if accumulation_dtype(grad_output, input) == torch.float64:
        return ops.sum_squared_grads_conv.reference(grad_output, input, *geometry)
    shape = grad_output.shape[1], input.shape[1] // groups, *kernel_size
    return _weight(grad_output, input, *geometry).view(shape), _bias(grad_output.flatten(2))
