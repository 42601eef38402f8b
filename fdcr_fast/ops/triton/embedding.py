"""Squared per-sample gradients of embedding tables, without atomics: tokens are sorted by row and sample first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdcr_fast.ops.squared_grads import accumulation_dtype
from fdcr_fast.ops.triton.elements import span
from fdcr_fast.ops.triton.launch import blocks, launch, power_of_two

_AT_ONCE = 8  # tokens whose gradients are loaded together


@triton.jit
def squared_embedding_grads(
    grad,
    order,
    begins,
    result,
    tokens,
    width,
    grad_sample,
    grad_token,
    grad_column,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program owns columns of one row, and adds the squared sums of the samples that looked it up, in order."""
    exact: tl.constexpr = result.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    d = span(tl.program_id(1).to(tl.int64) * COLUMNS, COLUMNS)
    known = d < width
    last = tl.load(begins + row + 1)
    total = tl.zeros((COLUMNS,), exact)
    of_sample = tl.zeros((COLUMNS,), exact)
    sample = tl.full((), -1, tl.int64)
    for first in range(tl.load(begins + row), last, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = first + i < last
            token = tl.load(order + first + i, mask=there, other=0)
            n = tl.where(there, token // tokens, sample)
            at = token // tokens * grad_sample + token % tokens * grad_token
            g = tl.load(grad + at + d * grad_column, mask=known & there, other=0.0).to(exact)
            total += tl.where(n == sample, 0.0, of_sample * of_sample)
            of_sample = tl.where(n == sample, of_sample, 0.0) + g
            sample = n
    tl.store(result + row * width + d, total + of_sample * of_sample, mask=known)


def sum_squared_grads_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    """Sum over samples of squared per-sample gradients of an embedding table."""
    width = grad_output.shape[2]
    result = grad_output.new_empty(num_embeddings, width, dtype=accumulation_dtype(grad_output))
    rows = indices.flatten()
    torch._assert_async((rows < num_embeddings).all(), f"an index is out of the range of {num_embeddings} embeddings")
    rows, order = rows.sort(stable=True)  # the tokens of a row stay in the order of the samples
    begins = torch.searchsorted(rows, torch.arange(num_embeddings + 1, device=rows.device))
    columns = power_of_two(width, most=256)
    launch(
        squared_embedding_grads,
        (num_embeddings, blocks(width, columns)),
        grad_output,
        order,
        begins,
        result,
        indices.shape[1],
        width,
        *grad_output.stride(),
        AT_ONCE=_AT_ONCE,
        COLUMNS=columns,
        num_warps=power_of_two(columns // 64, most=4),
    )
    return result
