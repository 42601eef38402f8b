"""Calls of every operator in sizes that occur on GPUs: for ``benchmarks`` and the tests of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]  # (*shape, dtype=...) to a tensor of numbers in [0, 1)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call: the operator's name, and its arguments on whatever tensors ``make`` makes."""

    name: str
    operator: str
    arguments: Callable[[Make], tuple[Any, ...]]


def clients(make: Make, K: int, P: int, dtype: torch.dtype = F32, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """Updates and Fishers: rows of ``[K, P]``, or tiles as a store holds them."""
    if tile is None:
        return make(1, K, P, dtype=dtype), make(1, K, P, dtype=dtype)
    data = make(-(-P // tile), K, 2, tile, dtype=dtype)
    return data[:, :, 1], data[:, :, 0]


def round_of(make: Make, K: int, *args: Any) -> tuple[Tensor, ...]:
    """Updates, Fishers, and ranges of these."""
    return *clients(make, K, *args), make(K, dtype=F64) * 0, make(K, dtype=F64) * 0 + 1


def both(K: int, P: int, dtype: torch.dtype = F32, tile: int | None = None, single: bool = True) -> Any:
    def arguments(make: Make) -> tuple[Any, ...]:
        alpha, totals = make(K, dtype=F64) + 0.5, make(2 * K + 1, dtype=F64) * 0
        return make(P), *round_of(make, K, P, dtype, tile), alpha / K, alpha / K, totals, True, True, single

    return arguments


def scores(make: Make, K: int, P: int) -> tuple[Any, ...]:
    return *round_of(make, K, P), make(K, dtype=F64) + 0.5, make(2 * K + 1, dtype=F64) * 0, P, True


def central(K: int, P: int, keep: int, nearest: bool, tile: int | None = None) -> Any:
    def arguments(make: Make) -> tuple[Any, ...]:
        return make(P), clients(make, K, P, F32, tile)[0], torch.ones(K, dtype=torch.bool), keep, nearest

    return arguments


def gram(transform: str, K: int, P: int) -> Any:
    def arguments(make: Make) -> tuple[Any, ...]:
        ranges = [torch.tensor([[0, P]])]
        read = torch.ones(K, dtype=torch.bool)
        return *round_of(make, K, P), read, [transform], ranges, make(1, K, K, dtype=F64) * 0, P, True

    return arguments


def layer(*shapes: tuple[int, ...], dtype: torch.dtype = F32, options: tuple[Any, ...] = ()) -> Any:
    return lambda make: (*(make(*shape, dtype=dtype) for shape in shapes), *options)


K, P = 100, 1_000_000
_IMAGES = (128, 128, 16, 16), (128, 64, 16, 16)
_GEOMETRY = (3, 3), (1, 1), (1, 1), (1, 1), 1

CASES = [
    Case("discrepancy_and_mean, [K, P]", "discrepancy_and_mean", both(K, P)),
    Case("discrepancy_and_mean, tiles of 16", "discrepancy_and_mean", both(K, P, tile=16)),
    Case("discrepancy_and_mean, tiles of 16, bfloat16", "discrepancy_and_mean", both(K, P, BF16, 16)),
    Case("discrepancy_and_mean, float64 products", "discrepancy_and_mean", both(K, P, tile=16, single=False)),
    Case("discrepancy_and_mean, K = 1000", "discrepancy_and_mean", both(1000, P, tile=16)),
    Case("discrepancy_and_mean, K = 10", "discrepancy_and_mean", both(10, P, tile=16)),
    Case("discrepancy, [K, P]", "discrepancy", lambda make: scores(make, K, P)),
    Case(
        "rescaled_mean, [K, P]",
        "rescaled_mean",
        lambda make: (make(P), *round_of(make, K, P), make(K, dtype=F64) / K, True),
    ),
    Case("importance_range, [K, P]", "importance_range", lambda make: (clients(make, K, P)[1], P)),
    Case("squared_norm, tiles of 16", "squared_norm", lambda make: (clients(make, K, P, F32, 16)[0], P)),
    Case(
        "fill_row, bfloat16 tiles",
        "fill_row",
        lambda make: ([make(P)], clients(make, 2, P, BF16, 16)[0][:, 0], make(3, dtype=F64)),
    ),
    Case("central_mean, median of 10", "central_mean", central(10, P, 2, False)),
    Case("central_mean, median of 100", "central_mean", central(K, P, 2, False, 16)),
    Case("central_mean, around the median of 15", "central_mean", central(15, P, 7, True, 16)),
    Case("gram, update", "gram", gram("update", 200, P)),
    Case("gram, fisher_update", "gram", gram("fisher_update", 200, P)),
    Case("linear, 128 positions", "sum_squared_grads_linear", layer((32, 128, 1024), (32, 128, 256))),
    Case("linear, bfloat16", "sum_squared_grads_linear", layer((32, 128, 1024), (32, 128, 256), dtype=BF16)),
    Case("linear, one position", "sum_squared_grads_linear", layer((256, 1, 120), (256, 1, 400))),
    Case("convolution 3x3", "sum_squared_grads_conv", layer(*_IMAGES, options=_GEOMETRY)),
    Case("convolution 3x3, float16", "sum_squared_grads_conv", layer(*_IMAGES, dtype=F16, options=_GEOMETRY)),
    Case("LayerNorm", "sum_squared_grads_norm", layer(*[(32, 128, 1, 256, 1)] * 2, options=(None, None, 1e-5))),
    Case(
        "GroupNorm, large groups",
        "sum_squared_grads_norm",
        layer(*[(32, 1, 8, 16, 1024)] * 2, options=(None, None, 1e-5)),
    ),
    Case("BatchNorm", "sum_squared_grads_norm", layer(*[(64, 1, 1, 64, 1024)] * 2, (1, 64), (1, 64), options=(1e-5,))),
    Case(
        "embedding",
        "sum_squared_grads_embedding",
        lambda make: (make(32, 128, 256), (make(32, 128) * 4096).long(), 4096),
    ),
]
