"""Triton kernels of the operators: functions of the names and arguments of those in :mod:`fdcr_fast.ops`.

One module per family holds kernels and their launchers. Block sizes are functions of shapes and of the device, nothing
is tuned at run time. Sums that several programs share are partial results, added in a fixed order: no atomics, the same
bits every time. Nothing waits for the device, and nothing needs more memory than partial results.

Importing this package imports Triton. ``TRITON_INTERPRET=1`` in the environment runs the kernels on CPU tensors.
"""

from fdcr_fast.ops.triton.aggregation import discrepancy, discrepancy_and_mean, rescaled_mean
from fdcr_fast.ops.triton.central import central_mean
from fdcr_fast.ops.triton.embedding import sum_squared_grads_embedding
from fdcr_fast.ops.triton.gram import gram
from fdcr_fast.ops.triton.layers import sum_squared_grads_conv, sum_squared_grads_linear
from fdcr_fast.ops.triton.norm import sum_squared_grads_norm
from fdcr_fast.ops.triton.statistics import fill_row, importance_range, squared_norm

__all__ = [
    "central_mean",
    "discrepancy",
    "discrepancy_and_mean",
    "fill_row",
    "gram",
    "importance_range",
    "rescaled_mean",
    "squared_norm",
    "sum_squared_grads_conv",
    "sum_squared_grads_embedding",
    "sum_squared_grads_linear",
    "sum_squared_grads_norm",
]
