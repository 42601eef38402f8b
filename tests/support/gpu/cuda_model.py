"""What the CUDA kernels read and write, and how many products they form: functions of shapes.

``moved`` counts every byte once per thread block that touches it: what a block reads again it finds in a cache. Partial
results, and adding them up, are included.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from fdcr_fast.ops.squared_grads import accumulation_dtype
from tests.support.gpu.traffic import Traffic

THREADS, TILE = 128, 64  # kThreads of csrc/cuda/kernels.h, kTile of product.cuh


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def _vector(matrix: Tensor) -> int:
    """How many numbers are read at a time: as in_vectors of elements.cuh."""
    vector = 16 // matrix.element_size()
    strides = matrix.stride()
    aligned = strides[2] == 1 and strides[0] % vector == strides[1] % vector == matrix.shape[2] % vector == 0
    return vector if aligned and matrix.storage_offset() % vector == 0 else 1


def _round(
    multiprocessors: int, updates: Tensor, fishers: Tensor | None, num_params: int, params: Tensor | None, scores: bool,
    single: bool,
) -> Traffic:  # fmt: skip
    clients, size = updates.shape[1], updates.element_size()
    vector = min(_vector(x) for x in (updates, fishers) if x is not None)
    if any(x.dtype != updates.dtype for x in (updates, fishers) if x is not None) or (not single and size == 2):
        vector = 1
    held = min(8, 128 // (vector * (4 if single else 8)))
    rows = 4
    while rows < 32 and rows * held < clients:
        rows *= 2
    step, is_held = THREADS // rows * vector, clients <= rows * held
    even = blocks(num_params, (8 if is_held else 2) * multiprocessors)
    stretch = blocks(max(even, 2048), step) * step
    programs = max(1, blocks(num_params, stretch))
    row = size + (0 if fishers is None else fishers.element_size())
    moved = clients * blocks(num_params, vector) * vector * row
    moved += programs * clients * 8 * (scores + (params is not None) + 2 * (fishers is not None))
    least = clients * num_params * row
    if scores:
        width = 2 * clients + 1
        moved += 2 * programs * width * 8 + 2 * width * 8
        if not is_held:  # sums are added to after every step but the first
            longer = sum(min(stretch, num_params - p * stretch) > step for p in range(programs))
            moved += longer * 2 * clients * 8
    if params is not None:
        moved += 2 * num_params * params.element_size()
        least += 2 * num_params * params.element_size()
    return Traffic(moved, least)


def _statistics(multiprocessors: int, values: Tensor, num_params: int, results: int) -> Traffic:
    clients, vector = values.shape[1], _vector(values)
    chunk = blocks(max(8192, blocks(num_params * clients, 16 * multiprocessors)), 1024) * 1024
    least = clients * num_params * values.element_size()
    read = clients * blocks(num_params, vector) * vector * values.element_size()
    return Traffic(read + 8 * results * clients * (2 * blocks(num_params, chunk) + 1), least)


def _layer(
    multiprocessors: int, grad: Tensor, input: Tensor, outs: int, columns: int, groups: int, spatial: int
) -> Traffic:
    """Exact for linear layers; of a convolution's input, every number is counted for each column that it is in."""
    samples, wide = len(grad), accumulation_dtype(grad, input).itemsize
    depth = 128 // wide
    squares = spatial == 1
    tiles = groups * blocks(outs, TILE) * max(1, blocks(columns, TILE))
    size = blocks(samples, depth) if squares else samples
    each = blocks(size, max(1, min(size, 256, blocks(2 * multiprocessors, max(1, tiles)))))
    splits = blocks(size, each)
    read = grad.numel() * grad.element_size() * max(1, blocks(columns, TILE))
    read += samples * spatial * groups * columns * blocks(outs, TILE) * input.element_size()
    result = groups * outs * (columns + 1) * wide
    moved = read + splits * result + (splits + 1) * result * (splits > 1)
    least = grad.numel() * grad.element_size() + input.numel() * input.element_size() + result
    if squares:
        runs = sum(blocks(min(samples - p * each * depth, each * depth), depth) for p in range(splits))
    else:
        runs = samples * blocks(spatial, depth)
    exact = wide == 8 or (not squares and grad.element_size() == input.element_size() == 2)
    products = runs * depth * groups * blocks(outs, 32) * blocks(columns, 32) * 1024 * (1 if exact else 3)
    return Traffic(moved, least, products)


def _linear(multiprocessors: int, grad: Tensor, input: Tensor) -> Traffic:
    return _layer(multiprocessors, grad, input, grad.shape[2], input.shape[2], 1, grad.shape[1])


def _conv(multiprocessors: int, grad: Tensor, input: Tensor, kernel: Any, *geometry: Any) -> Traffic:
    groups = geometry[-1]
    columns = input.shape[1] // groups * prod(kernel)
    return _layer(multiprocessors, grad, input, grad.shape[1] // groups, columns, groups, prod(grad.shape[2:]))


def _gram(
    multiprocessors: int, updates: Tensor, fishers: Tensor | None, low: Any, high: Any, read: Any, transforms: Any,
    ranges: Any, total: Any, num_params: int, single: bool,
) -> Traffic:  # fmt: skip
    clients = updates.shape[1]
    wide = not single or updates.element_size() == 8
    depth, edge = 16 if wide else 32, blocks(clients, TILE)
    pairs = edge * (edge + 1) // 2
    splits = max(1, min(blocks(2 * multiprocessors, pairs), blocks(num_params, 32)))
    moved = least = products = 0
    for transform, selected in zip(transforms, ranges, strict=True):
        lengths = (selected[:, 1] - selected[:, 0]).tolist()
        row = 0 if transform == "fourth_root_fisher" else updates.element_size()
        row += 0 if transform == "update" or fishers is None else fishers.element_size()
        moved += clients * sum(lengths) * row * edge
        if transform == "reweighted_update":
            moved += 16 * clients * edge * splits
        lower = clients * (clients + 1) // 2 * 8
        moved += (2 * splits + 1) * lower + clients * clients * 8
        least += clients * sum(lengths) * row + clients * clients * 8
        products += pairs * sum(blocks(n, depth) for n in lengths) * TILE * TILE * depth * (1 if wide else 3)
    return Traffic(moved, least, products)


MODELS: dict[str, Callable[..., Traffic]] = {
    "sum_squared_grads_linear": _linear,
    "sum_squared_grads_conv": _conv,
    "importance_range": lambda sms, fishers, num_params: _statistics(sms, fishers, num_params, 2),
    "squared_norm": lambda sms, updates, num_params: _statistics(sms, updates, num_params, 1),
    "discrepancy": lambda sms, u, f, low, high, alpha, totals, P, single: _round(sms, u, f, P, None, True, single),
    "rescaled_mean": lambda sms, w, u, f, low, high, weights, single: _round(sms, u, f, len(w), w, False, single),
    "discrepancy_and_mean": lambda sms, w, u, f, low, high, alpha, weights, totals, reweight, rescale, single: _round(
        sms, u, f if reweight or rescale else None, len(w), w, True, single
    ),
    "gram": _gram,
}


def bytes_moved(operator: str, args: tuple[Any, ...], multiprocessors: int = 132) -> Traffic:
    """Of a call on a GPU with so many multiprocessors: an H100 has 132."""
    return MODELS[operator](multiprocessors, *args)
