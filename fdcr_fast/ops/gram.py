"""Inner products of all pairs of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fdcr_fast.ops.operator import operator
from fdcr_fast.ops.ranges import check_bounds, check_ranges, selected
from fdcr_fast.ops.tiles import check_clients, check_read, column_blocks

# Transformed rows from updates, Fishers, and the Fishers' smallest and largest entries.
GRAM_TRANSFORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "update": lambda delta, fisher, low, high: delta,
    "fisher_update": lambda delta, fisher, low, high: fisher.sqrt() * delta,
    "reweighted_update": lambda delta, fisher, low, high: (fisher - low) / (high - low) * delta,
    "fourth_root_fisher": lambda delta, fisher, low, high: fisher.sqrt().sqrt(),
}


def _check_gram(
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
) -> None:
    check_clients(num_params, updates, fishers, fisher_min, fisher_max)
    clients = updates.shape[1]
    check_read(read, clients)
    for transform in transforms:
        message = f"unknown transform {transform}, expected one of {sorted(GRAM_TRANSFORMS)}"
        torch._check(transform in GRAM_TRANSFORMS, partial(str, message))
        message = f"{transform} reads Fishers, and there are none"
        torch._check(transform == "update" or fishers is not None, partial(str, message))
    torch._check(len(ranges) == len(transforms), lambda: f"expected ranges for each of {len(transforms)} transforms")
    for given in ranges:
        check_bounds(given)
    expected = (len(transforms), clients, clients)
    torch._check(
        total.dtype == torch.float64 and total.shape == expected,
        lambda: f"total must be float64 {expected}, got {total.dtype} {tuple(total.shape)}",
    )


def _fake_gram(
    updates: object,
    fishers: object,
    fisher_min: object,
    fisher_max: object,
    read: object,
    transforms: object,
    ranges: object,
    total: Tensor,
    *_: object,
) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


@operator(
    check=_check_gram,
    fake=_fake_gram,
    gpu_kernels=("cuda", "triton"),
    schema="(Tensor updates, Tensor? fishers, Tensor? fisher_min, Tensor? fisher_max, Tensor read, str[] transforms, "
    "Tensor[] ranges, Tensor total, int num_params, bool single) -> Tensor",
)
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
    """Inner products of all pairs of transformed clients, for several views of them in one pass.

    ``total[m, i, j] + sum_v x_i[v] x_j[v]`` with ``v`` in the ranges of view ``m`` and ``x_k[v]`` by its transform

    - ``"update"``: ``updates_k[v]``
    - ``"fisher_update"``: ``sqrt(F_k[v]) * updates_k[v]``
    - ``"reweighted_update"``: ``I_k[v] * updates_k[v]``, ``I_k = (F_k - min F_k) / (max F_k - min F_k)``
    - ``"fourth_root_fisher"``: ``F_k[v]^(1/4)``

    With ``single`` entries and products are float32 where no data are float64, summed in float32 over at most 512
    parameters, in several sums of at most 128 each, and from there in float64; a client's entries are divided by a
    power of two there, if their products could leave the range of float32; :func:`fdcr_fast.grams` states the error.
    Otherwise everything is float64.

    NaN, infinity, the root of a negative Fisher entry, and the importance of a constant Fisher make the row and column
    of that client non-finite, and no others. ``total`` threaded through successive spans of a multiple of
    ``max(1, STRETCH // L)`` tiles gives the same bits as one call for all of them, except by kernels on GPUs.

    Args:
        updates: Tiled client matrix ``[T, K, L]``.
        fishers: Tiled like ``updates``, or None where all transforms are ``"update"``.
        fisher_min: ``[K]`` float64 over all parameters, not only those given here; read by ``"reweighted_update"``
            alone. None without ``fishers``.
        fisher_max: ``[K]`` float64, as ``fisher_min``.
        read: bool ``[K]``, on the CPU. The rows and columns of the other clients, which are not read, are NaN.
        transforms: One name for each of ``M`` views.
        ranges: For each view int64 ``[R, 2]`` on the CPU: ranges ``[start, stop)`` of the ``P`` parameters, ascending
            and disjoint.
        total: ``[M, K, K]`` float64, symmetric.
        num_params: ``P``.
        single: Whether products may be formed in float32, which is faster.

    Returns:
        ``[M, K, K]``, float64, symmetric.
    """
    check_ranges(ranges, num_params)
    read = read.to(updates.device)
    result = total.clone(memory_format=torch.contiguous_format)
    both = read.unsqueeze(0) & read.unsqueeze(1)
    result[:, ~both] = torch.nan
    first = 0
    for block, tile in column_blocks(updates, num_params):
        stop = first + block.shape[1]
        for view, transform in enumerate(transforms):
            columns = selected(ranges[view], first, stop).to(updates.device)
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
