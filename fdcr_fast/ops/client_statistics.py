"""Statistics of every client's row."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.ops.operator import operator
from fdcr_fast.ops.tiles import check_clients, column_blocks


def _check_range(fishers: Tensor, num_params: int) -> None:
    torch._check(num_params >= 1, lambda: f"the range of {num_params} parameters is undefined")
    check_clients(num_params, fishers)


def _fake_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    return _per_client(fishers), _per_client(fishers)


@operator(check=_check_range, fake=_fake_range, gpu_kernels=("cuda", "triton"))
def importance_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of every client's diagonal Fisher (paper eq. 6); NaN if any entry is NaN.

    Args:
        fishers: Tiled client matrix ``[T, K, L]``.
        num_params: ``P``, at least 1.

    Returns:
        ``(min [K], max [K])``, float64.
    """
    clients = fishers.shape[1]
    low = fishers.new_full((clients,), torch.inf, dtype=torch.float64)
    high = fishers.new_full((clients,), -torch.inf, dtype=torch.float64)
    for block, _ in column_blocks(fishers, num_params):
        low = torch.minimum(low, block.amin(1).double())
        high = torch.maximum(high, block.amax(1).double())
    return low, high


def _check_squared_norm(updates: Tensor, num_params: int) -> None:
    check_clients(num_params, updates)


def _per_client(clients: Tensor, *_: object) -> Tensor:
    return clients.new_empty(clients.shape[1], dtype=torch.float64)


@operator(check=_check_squared_norm, fake=_per_client, gpu_kernels=("cuda", "triton"))
def squared_norm(updates: Tensor, num_params: int) -> Tensor:
    """Squared Euclidean norm of every client's update, summed in float64; NaN and infinity propagate.

    Args:
        updates: Tiled client matrix ``[T, K, L]``.
        num_params: ``P``.

    Returns:
        ``[K]``, float64.
    """
    total = updates.new_zeros(updates.shape[1], dtype=torch.float64)
    for block, _ in column_blocks(updates, num_params):
        total += block.double().square().sum(1)
    return total
