"""The middle of every parameter over the clients: medians, trimmed means, and the mean around the median."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.ops.aggregation import check_global, fake_params
from fdcr_fast.ops.operator import operator
from fdcr_fast.ops.tiles import check_clients, check_read, column_blocks


def _check_central_mean(global_params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> None:
    check_global(global_params)
    check_clients(global_params.numel(), updates)
    check_read(read, updates.shape[1])
    torch._check(keep >= 1, lambda: f"keep must be at least 1, got {keep}")


@operator(check=_check_central_mean, fake=fake_params, gpu_kernels=("triton",))
def central_mean(global_params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> Tensor:
    """For every parameter the mean of ``keep`` of the clients' values, added to the global parameters.

    Of the ``n`` values in order, those in the middle, ``(n - keep) / 2`` left out on either side: the trimmed mean, and
    for ``keep`` of 1 or 2 the median. With ``nearest`` those nearest to the median, of two equally near ones the
    smaller: the mean around the median. The order of the clients changes no bit. A result beyond the largest number of
    its dtype becomes that number.

    Args:
        global_params: ``w [P]``.
        updates: Tiled client matrix ``[T, K, L]``, finite where it is read.
        read: bool ``[K]``, on the CPU, whose values count; the others are not read.
        keep: From 1 to ``n``; without ``nearest``, ``n - keep`` is even.
        nearest: Whether the values are chosen by their distance from the median instead of by rank.

    Returns:
        ``[P]``, dtype of ``global_params``.
    """
    read = read.to(updates.device)
    n = int(read.sum())
    check_keep(keep, n, nearest)
    result = torch.empty_like(global_params, memory_format=torch.contiguous_format)
    limit = torch.finfo(result.dtype).max
    start = 0
    for block, _ in column_blocks(updates, global_params.numel()):
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
