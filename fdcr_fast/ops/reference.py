"""What every operator means, in plain PyTorch: the fallback on any device and the yardstick of the compiled kernels.

Work is done in blocks, so that no temporary grows with ``K * P`` or with the number of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast.ops.network_reference import network_grad as network_grad
from fdcr_fast.ops.network_reference import network_outputs as network_outputs
from fdcr_fast.ops.network_reference import sgd_step as sgd_step
from fdcr_fast.ops.network_reference import sum_squared_network_grads as sum_squared_network_grads
from fdcr_fast.ops.network_reference import train_network as train_network

# Elements of the largest temporary: 64 MiB of float64.
_BLOCK_ELEMENTS = 1 << 23


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which gradients are multiplied and summed: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def sum_squared_grads_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a linear layer; see ``schemas``."""
    dtype = accumulation_dtype(grad_output, input)
    n, t, out_features = grad_output.shape
    in_features = input.shape[2]
    weight = torch.zeros(out_features, in_features, dtype=dtype, device=input.device)
    bias = torch.zeros(out_features, dtype=dtype, device=input.device)
    if t == 1:  # (g x)^2 = g^2 x^2: one matrix product for all samples
        g2, x2 = grad_output[:, 0].to(dtype).square(), input[:, 0].to(dtype).square()
        return g2.t() @ x2, g2.sum(0)
    for samples in _sample_blocks(n, max(out_features * in_features, t * (out_features + in_features))):
        g, x = grad_output[samples].to(dtype), input[samples].to(dtype)
        weight += torch.bmm(g.transpose(1, 2), x).square_().sum(0)
        bias += g.sum(1).square_().sum(0)
    return weight, bias


def sum_squared_grads_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a convolution; see ``schemas``."""
    dtype = accumulation_dtype(grad_output, input)
    n, out_channels = grad_output.shape[:2]
    in_channels = input.shape[1]
    positions = grad_output.shape[2:].numel()
    columns = in_channels // groups * torch.Size(kernel_size).numel()
    weight = torch.zeros(groups, out_channels // groups, columns, dtype=dtype, device=input.device)
    bias = torch.zeros(out_channels, dtype=dtype, device=input.device)
    pad = [side for p in reversed(padding) for side in (p, p)]
    dims = len(kernel_size)
    for samples in _sample_blocks(n, groups * columns * (positions + out_channels // groups)):
        g = grad_output[samples].to(dtype)
        windows = F.pad(input[samples].to(dtype), pad)
        for d in range(dims):
            windows = windows.unfold(2 + d, (kernel_size[d] - 1) * dilation[d] + 1, stride[d])
            windows = windows[..., :: dilation[d]]
        # [n, C, *output, *kernel] -> [n, group, C / groups * kernel, output]
        order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
        x = windows.permute(order).reshape(len(g), groups, columns, positions)
        per_sample = g.reshape(len(g), groups, out_channels // groups, positions) @ x.transpose(2, 3)
        weight += per_sample.square_().sum(0)
        bias += g.flatten(2).sum(2).square_().sum(0)
    return weight.view(out_channels, in_channels // groups, *kernel_size), bias


def sum_squared_grads_norm(
    grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum over samples of squared per-sample gradients of a norm layer's scale and shift; see ``schemas``."""
    dtype = accumulation_dtype(grad_output, input)
    weight = torch.zeros(input.shape[2:4], dtype=dtype, device=input.device)
    bias = torch.zeros_like(weight)
    shared = (3, 4)
    for samples in _sample_blocks(len(input), input.shape[1:].numel()):
        g, x = grad_output[samples].to(dtype), input[samples].to(dtype)
        m = x.mean(shared, keepdim=True) if mean is None else mean.to(dtype)[..., None]
        v = (x - m).square().mean(shared, keepdim=True) if variance is None else variance.to(dtype)[..., None]
        weight += (g * (x - m) * (v + eps).rsqrt()).sum((1, 4)).square_().sum(0)
        bias += g.sum((1, 4)).square_().sum(0)
    return weight, bias


def sum_squared_grads_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    """Sum over samples of squared per-sample gradients of an embedding table; see ``schemas``."""
    dtype = accumulation_dtype(grad_output)
    width = grad_output.shape[2]
    result = torch.zeros(num_embeddings, width, dtype=dtype, device=grad_output.device)
    for samples in _sample_blocks(len(indices), indices.shape[1] * width):
        sample, token = (indices[samples] >= 0).nonzero(as_tuple=True)
        row = indices[samples][sample, token]
        # Equal tokens of one sample are one pair (row, sample), whose gradient is the sum of theirs.
        pairs, pair = (row * len(indices) + sample).unique(return_inverse=True)
        sums = result.new_zeros(len(pairs), width)
        sums.index_add_(0, pair, grad_output[samples][sample, token].to(dtype))
        result.index_add_(0, pairs // len(indices), sums.square_())
    return result


def fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> Tensor:
    """Copy a vector into tiles, with statistics of what is kept; see ``schemas``."""
    num_params = sum(piece.shape[0] for piece in values)
    if num_params == 0:
        return statistics.clone()
    (vector,) = _filled(values, row[:, None], base)
    norm, low, high = statistics.unbind()
    for start in range(0, num_params, _BLOCK_ELEMENTS):
        block = vector[start : start + _BLOCK_ELEMENTS].double()
        norm = norm + block.square().sum().to(statistics.device)
        low = torch.minimum(low, block.amin().to(statistics.device))
        high = torch.maximum(high, block.amax().to(statistics.device))
    return torch.stack([norm, low, high])


def fill_rows(values: Sequence[Tensor], rows: Tensor, base: Tensor | None = None) -> None:
    """Copy vectors into tiles; see ``schemas``."""
    if sum(piece.shape[0] for piece in values):
        _filled(values, rows, base)


def _filled(values: Sequence[Tensor], rows: Tensor, base: Tensor | None) -> Tensor:
    """What was copied into the rows, ``[K, P]``."""
    clients, length = rows.shape[1:]
    dtype = rows.dtype if base is None else base.dtype
    vectors = torch.cat([piece.to(rows.device, dtype) for piece in values]).view(clients, -1)
    if base is not None:
        vectors = (vectors - base.to(rows.device)).to(rows.dtype)
    tiles, rest = divmod(vectors.shape[1], max(length, 1))
    rows[:tiles].copy_(vectors[:, : tiles * length].view(clients, tiles, length).transpose(0, 1))
    if rest:
        rows[tiles, :, :rest].copy_(vectors[:, tiles * length :])
    return vectors


def importance_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest Fisher entry per client; see ``schemas``."""
    clients = fishers.shape[1]
    low = fishers.new_full((clients,), torch.inf, dtype=torch.float64)
    high = fishers.new_full((clients,), -torch.inf, dtype=torch.float64)
    for block, _ in _column_blocks(fishers, num_params):
        low = torch.minimum(low, block.amin(1).double())
        high = torch.maximum(high, block.amax(1).double())
    return low, high


def squared_norm(updates: Tensor, num_params: int) -> Tensor:
    """Sum of squares per client in float64; see ``schemas``."""
    total = updates.new_zeros(updates.shape[1], dtype=torch.float64)
    for block, _ in _column_blocks(updates, num_params):
        total += block.double().square().sum(1)
    return total


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
    """Sums of squared distances to the mean reweighted update; see ``schemas``."""
    clients = len(alpha)
    read = alpha != 0
    distance, norm = alpha.new_full((2, clients), torch.nan)
    distance[read] = norm[read] = 0.0
    mean_square = alpha.new_zeros(1)
    for block, tile in _column_blocks(updates, num_params):
        u = block[read].double()
        norm[read] += u.square().sum(1)
        if fishers is not None and fisher_min is not None and fisher_max is not None:
            u *= _importance(fishers, tile, read, fisher_min, fisher_max)
        mean = alpha[read] @ u
        mean_square += mean.square().sum()
        distance[read] += (mean - u).square_().sum(1)
    return totals + torch.cat([distance, norm, mean_square])


def rescaled_mean(
    global_params: Tensor,
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    weights: Tensor,
    single: bool,
) -> Tensor:
    """Weighted mean of rescaled updates, added to the global parameters; see ``schemas``."""
    read = weights != 0
    result = torch.empty_like(global_params, memory_format=torch.contiguous_format)
    limit = torch.finfo(result.dtype).max
    start = 0
    for block, tile in _column_blocks(updates, global_params.numel()):
        delta = block[read].double()
        if fishers is not None and fisher_min is not None and fisher_max is not None:
            delta *= 2 * torch.sigmoid(_importance(fishers, tile, read, fisher_min, fisher_max))
        stop = start + block.shape[1]
        result[start:stop] = (global_params[start:stop].double() + weights[read] @ delta).clamp_(-limit, limit)
        start = stop
    return result


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
    """Both, one after the other; see ``schemas``."""
    importances = (fishers, fisher_min, fisher_max)
    none = (None, None, None)
    return (
        discrepancy(updates, *(importances if reweight else none), alpha, totals, global_params.numel(), single),
        rescaled_mean(global_params, updates, *(importances if rescale else none), weights, single),
    )


def central_mean(global_params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> Tensor:
    """The middle of every parameter over the clients, added to the global parameters; see ``schemas``."""
    read = read.to(updates.device)
    n = int(read.sum())
    check_keep(keep, n, nearest)
    result = torch.empty_like(global_params, memory_format=torch.contiguous_format)
    limit = torch.finfo(result.dtype).max
    start = 0
    for block, _ in _column_blocks(updates, global_params.numel()):
        x = block[read].double().sort(0).values
        if nearest:
            twice = x[(n - 1) // 2] + x[n // 2]
            first = (twice > x[: n - keep] + x[keep:]).sum(0)  # windows that lie further down than the nearest one
            rank = torch.arange(n, device=x.device).unsqueeze(1)
            x = torch.where((first <= rank) & (rank < first + keep), x, 0)
        else:
            x = x[(n - keep) // 2 : (n + keep) // 2]
        stop = start + x.shape[1]
        result[start:stop] = (global_params[start:stop].double() + x.sum(0) / keep).clamp_(-limit, limit)
        start = stop
    return result


def check_keep(keep: int, clients: int, nearest: bool) -> None:
    """Refuse numbers of values that are no central part of those of so many clients."""
    message = f"keep = {keep} is not a central part of {clients} clients"
    torch._check(1 <= keep <= clients and (nearest or (clients - keep) % 2 == 0), lambda: message)


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
    float64: bool,
) -> Tensor:
    """Inner products of transformed clients, always in float64; see ``schemas``."""
    check_ranges(ranges, num_params)
    read = read.to(updates.device)
    result = total.clone(memory_format=torch.contiguous_format)
    both = read.unsqueeze(0) & read.unsqueeze(1)
    result[:, ~both] = torch.nan
    first = 0
    for block, tile in _column_blocks(updates, num_params):
        stop = first + block.shape[1]
        for view, transform in enumerate(transforms):
            columns = _selected(ranges[view], first, stop).to(updates.device)
            delta = block[read][:, columns].double()
            if fishers is None or fisher_min is None or fisher_max is None:
                x = delta
            else:
                x = GRAM_TRANSFORMS[transform](
                    delta,
                    fishers[tile[0], :, tile[1]][read][:, columns].double(),
                    fisher_min[read, None],
                    fisher_max[read, None],
                )
            products = (x @ x.t()).tril()  # a product with itself is not bit for bit symmetric
            result[view, both] += (products + products.tril(-1).t()).flatten()
        first = stop
    return result


def check_ranges(ranges: Sequence[Tensor], num_params: int) -> None:
    """Refuse ranges that are not ascending, disjoint parts of the parameters."""
    for pairs in ranges:
        bounds = [0, *pairs.flatten().tolist(), num_params]
        message = f"ranges must be ascending, disjoint parts of {num_params} parameters, got {pairs.tolist()}"
        torch._check(all(a <= b for a, b in itertools.pairwise(bounds)), partial(str, message))


def _selected(ranges: Tensor, first: int, stop: int) -> Tensor:
    """Which parameters of ``[first, stop)`` the ranges hold, counted from ``first``."""
    params = torch.arange(first, stop)
    if len(ranges) == 0:
        return params[:0]
    last_begun = torch.searchsorted(ranges[:, 0].contiguous(), params, right=True) - 1
    return ((last_begun >= 0) & (params < ranges[last_begun, 1])).nonzero().squeeze(1)


# Transformed rows from updates, Fishers, and the Fishers' smallest and largest entries.
GRAM_TRANSFORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "update": lambda delta, fisher, low, high: delta,
    "fisher_update": lambda delta, fisher, low, high: fisher.sqrt() * delta,
    "reweighted_update": lambda delta, fisher, low, high: (fisher - low) / (high - low) * delta,
    "fourth_root_fisher": lambda delta, fisher, low, high: fisher.sqrt().sqrt(),
}


def _importance(
    fishers: Tensor, tile: tuple[int, slice], read: Tensor, fisher_min: Tensor, fisher_max: Tensor
) -> Tensor:
    t, columns = tile
    low, high = fisher_min[read, None], fisher_max[read, None]
    return (fishers[t, :, columns][read].double() - low) / (high - low)


def _sample_blocks(n: int, elements_per_sample: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, elements_per_sample))
    return (slice(i, i + step) for i in range(0, n, step))


def _column_blocks(tiled: Tensor, num_params: int) -> Iterator[tuple[Tensor, tuple[int, slice]]]:
    """Blocks [K, columns] of a tiled client matrix [T, K, L] in the order of the parameters, without the padding."""
    tiles, clients, length = tiled.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, clients))
    for t in range(tiles):
        end = min(length, num_params - t * length)
        for start in range(0, end, step):
            columns = slice(start, min(start + step, end))
            yield tiled[t, :, columns], (t, columns)
