"""What kernels share: addresses of tiled client matrices, rounding, and operands of matrix products."""

from __future__ import annotations

import triton
import triton.language as tl

from fdcr_fast.ops.triton.launch import INTERPRETED

INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def span(first, SIZE: tl.constexpr):
    """``first, ..., first + SIZE - 1`` in 64 bits."""
    return first + tl.arange(0, SIZE).to(tl.int64)


@triton.jit
def tiled(v, length, tile_stride, column_stride, TILED: tl.constexpr):
    """Where parameter ``v`` of a row lies: in tile ``v // length`` at ``v % length``; without tiles at ``v``."""
    if TILED:
        return v // length * tile_stride + v % length * column_stride
    return v * column_stride


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in another type, by way of float32 and to nearest even, as PyTorch does.

    By hand for bfloat16: Triton's interpreter cuts bits off.
    """
    if dtype == tl.float64:
        return x.to(tl.float64)
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.float32).to(dtype)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``; operands of one narrow type stay narrow, others get that of the accumulator."""
    if a.dtype != b.dtype or (INTERPRETER and a.dtype == tl.bfloat16):  # the interpreter would multiply the bits
        a = a.to(accumulator.dtype)
        b = b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)
