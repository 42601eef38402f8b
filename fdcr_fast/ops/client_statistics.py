"""Statistics of every client's row."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fdcr_fast.ops.operator import check_floating, operator
from fdcr_fast.ops.ranges import check_bounds, check_ranges, selected
from fdcr_fast.ops.tiles import check_clients, check_read, column_blocks


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


def _check_moments(
    values: Tensor,
    factors: list[Tensor],
    read: Tensor,
    ranges: list[Tensor],
    total: Tensor,
    num_params: int,
    squares: list[bool],
) -> None:
    check_clients(num_params, values)
    clients, views = values.shape[1], len(factors)
    for own in factors:
        check_floating(factors=own)
        torch._check(
            own.shape in ((0,), (num_params,)),
            partial("factors must be [{}] or [0], got {}".format, num_params, own.shape),
        )
    check_read(read, clients)
    torch._check(len(ranges) == len(squares) == views, lambda: f"expected factors, ranges and squares of {views} views")
    for given in ranges:
        check_bounds(given)
    torch._check(
        total.dtype == torch.float64 and total.shape == (views, 2, clients),
        lambda: f"total must be float64 [{views}, 2, {clients}], got {total.dtype} {tuple(total.shape)}",
    )


def _fake_moments(values: object, factors: object, read: object, ranges: object, total: Tensor, *_: object) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


@operator(check=_check_moments, fake=_fake_moments)
def moments(
    values: Tensor,
    factors: list[Tensor],
    read: Tensor,
    ranges: list[Tensor],
    total: Tensor,
    num_params: int,
    squares: list[bool],
) -> Tensor:
    """Sums over some parameters of weighted entries of every client, and of their squares, in float64.

    For each of ``M`` views ``total[m, 0, k] + sum_v x_kv`` and ``total[m, 1, k] + sum_v x_kv^2`` with ``v`` in its
    ranges and ``x_kv = factors_v values_kv``, or with ``squares`` ``x_kv = factors_v values_kv^2``, from one reading
    for all of them. The CPU kernels give a round the same bits if it comes in spans of a multiple of
    ``max(1, STRETCH // L)`` tiles, and a view the same bits beside others.

    Args:
        values: Tiled client matrix ``[T, K, L]``.
        factors: For each view ``[P]``, or ``[0]`` for ones.
        read: bool ``[K]``, on the CPU. The sums of the other clients, which are not read, are NaN.
        ranges: For each view int64 ``[R, 2]`` on the CPU: ranges ``[start, stop)`` of the ``P`` parameters, ascending
            and disjoint.
        total: ``[M, 2, K]`` float64.
        num_params: ``P``.
        squares: For each view whether entries are squared.

    Returns:
        ``[M, 2, K]``, float64.
    """
    check_ranges(ranges, num_params)
    read = read.to(values.device)
    result = total.clone(memory_format=torch.contiguous_format)
    result[:, :, ~read] = torch.nan
    first = 0
    for block, _ in column_blocks(values, num_params):
        stop = first + block.shape[1]
        for view, own in enumerate(factors):
            columns = selected(ranges[view], first, stop).to(values.device)
            x = block[read][:, columns].double()
            if squares[view]:
                x = x.square()
            if len(own):
                x = x * own[first:stop][columns]
            result[view][:, read] += torch.stack([x.sum(1), x.square().sum(1)])
        first = stop
    return result
