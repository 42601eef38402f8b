"""What the Triton kernels read and write, and how many products they form: functions of shapes.

``moved`` counts every byte once per program that touches it: what a program reads again it finds in a cache. Additions
of partial results, by PyTorch, are left out; they are a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from fdcr_fast.ops.triton import aggregation, central, launch, layers, norm, statistics
from fdcr_fast.ops.triton.gram import clients_of, count_of
from fdcr_fast.ops.triton.launch import H100, blocks
from tests.support.gpu.traffic import Traffic


def _round(
    updates: Tensor, fishers: Tensor | None, num_params: int, *, scores: bool, params: Tensor | None, single: bool
) -> Traffic:
    tiles, clients, length = updates.shape
    row = updates.element_size() + (0 if fishers is None else fishers.element_size())
    moved = least = clients * num_params * row
    chunks = blocks(num_params, aggregation._CHUNK)
    held = aggregation.block_of(clients, not single, H100).held
    if tiles > 1:  # the rest of the last tile is read, and ignored
        moved = clients * tiles * length * row
    per_client = (0 if fishers is None else 16) + (8 if scores else 0) + (8 if params is not None else 0)
    moved += chunks * clients * per_client
    if scores:
        moved += chunks * (2 * clients + 1) * 8
        if not held:
            moved += chunks * 2 * clients * 8
    if params is not None:
        moved += 2 * num_params * params.element_size()
        least += 2 * num_params * params.element_size()
    return Traffic(moved, least)


def _statistics(values: Tensor, num_params: int, results: int) -> Traffic:
    tiles, clients, length = values.shape
    least = clients * num_params * values.element_size()
    columns = tiles * length if tiles > 1 else num_params
    chunks = blocks(num_params, statistics._CHUNK)
    return Traffic(clients * (columns * values.element_size() + chunks * results * 8), least)


def _central_mean(params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> Traffic:
    tiles, _, length = updates.shape
    clients, num_params, size = int(read.sum()), len(params), updates.element_size()
    least = clients * num_params * size + 2 * num_params * params.element_size()
    sorts = clients <= central._SORTED
    chunk = central.columns_of(clients, size, nearest) if sorts else central._CHUNK
    padding = tiles * length - num_params if tiles > 1 else 0
    return Traffic(least + clients * (padding * size + blocks(num_params, chunk) * 8), least)


def _fill_row(values: list[Tensor], row: Tensor, given: Tensor) -> Traffic:
    least = sum(len(piece) * (piece.element_size() + row.element_size()) for piece in values)
    return Traffic(least + 24 * sum(blocks(len(piece), statistics._CHUNK) for piece in values), least)


def _gram(updates: Tensor, fishers: Tensor | None, *args: Any) -> Traffic:
    clients = updates.shape[1]
    side = clients_of(clients, H100)
    transforms, ranges = args[3], args[4]
    moved = least = products = 0
    edge = blocks(clients, side)
    pairs = edge * (edge + 1) // 2
    inside = sum(min(side, clients - i * side) ** 2 for i in range(edge))  # products within the tiles on the diagonal
    for transform, bounds in zip(transforms, ranges, strict=True):
        row = 0 if transform == "fourth_root_fisher" else updates.element_size()
        row += 0 if transform == "update" or fishers is None else fishers.element_size()
        selected, steps = int((bounds[:, 1] - bounds[:, 0]).sum()), count_of(bounds)
        parts = launch.splits(steps, pairs, updates.device)
        least += clients * selected * row + clients * clients * 8
        moved += edge * clients * (selected * row + parts) + parts * 4 * (clients**2 + inside) + pairs * steps * 16
        products += pairs * side**2 * selected
    return Traffic(moved, least, products)


def _layer(grad: Tensor, input: Tensor, columns: int, groups: int) -> Traffic:
    samples, outs, positions = grad.shape
    squared = positions == 1
    of_outs, of_columns, of_positions = layers.tile_of(outs // groups, columns, samples if squared else positions, H100)
    out_tiles, column_tiles = blocks(outs // groups, of_outs), blocks(columns, of_columns)
    terms = blocks(samples, of_positions) if squared else samples
    parts = launch.splits(terms, groups * out_tiles * column_tiles, input.device)
    bias = launch.splits(samples, blocks(outs, layers.bias_tile_of(outs, positions)[0]), input.device)
    moved = (column_tiles + 1) * grad.numel() * grad.element_size()  # once more for the bias
    moved += out_tiles * input.numel() * input.element_size() + (parts * columns + bias) * outs * 4
    least = grad.numel() * grad.element_size() + input.numel() * input.element_size() + (columns + 1) * outs * 4
    return Traffic(moved, least, samples * positions * outs * columns)


def _norm(grad: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> Traffic:
    samples, positions, groups, channels, _ = input.shape
    least = grad.numel() * grad.element_size() + input.numel() * input.element_size() + 8 * groups * channels
    held, (of_channels, _, _) = norm.block_of(input, mean is None or variance is None)
    parts = launch.splits(samples, groups * blocks(channels, of_channels), input.device)
    moved = least + 8 * (parts - 1) * groups * channels
    given = 4 * samples * positions * groups  # statistics of every sample, position and group
    if not held and (mean is None or variance is None):
        moved += input.numel() * input.element_size() + 2 * given + 2 * given * blocks(channels, of_channels)
    elif mean is not None or variance is not None:
        moved += sum(4 * parts * groups * channels for x in (mean, variance) if x is not None)
    return Traffic(moved, least)


def _embedding(grad: Tensor, indices: Tensor, num_embeddings: int) -> Traffic:
    width = grad.shape[2]
    column_blocks = blocks(width, launch.power_of_two(width, most=256))
    least = grad.numel() * grad.element_size() + num_embeddings * width * 4
    return Traffic(least + column_blocks * (indices.numel() + 2 * num_embeddings) * 8, least)


def bytes_moved(operator: str, args: tuple[Any, ...]) -> Traffic:
    """Of a call of an operator by its positional arguments; nobody is left out, and all indices are valid."""
    return _MODELS[operator](*args)


_MODELS: dict[str, Callable[..., Traffic]] = {
    "discrepancy_and_mean": lambda w, u, f, low, high, a, b, t, reweight, rescale, single: _round(
        u, f if reweight or rescale else None, len(w), scores=True, params=w, single=single
    ),
    "discrepancy": lambda u, f, low, high, alpha, totals, P, single: _round(
        u, f, P, scores=True, params=None, single=single
    ),
    "rescaled_mean": lambda w, u, f, low, high, weights, single: _round(
        u, f, len(w), scores=False, params=w, single=single
    ),
    "importance_range": lambda fishers, P: _statistics(fishers, P, 2),
    "squared_norm": lambda updates, P: _statistics(updates, P, 1),
    "central_mean": _central_mean,
    "fill_row": _fill_row,
    "gram": _gram,
    "sum_squared_grads_linear": lambda g, x: _layer(g.transpose(1, 2), x, x.shape[2], 1),
    "sum_squared_grads_conv": lambda g, x, kernel, stride, padding, dilation, groups: _layer(
        g.flatten(2), x, x.shape[1] // groups * prod(kernel), groups
    ),
    "sum_squared_grads_norm": _norm,
    "sum_squared_grads_embedding": _embedding,
}
