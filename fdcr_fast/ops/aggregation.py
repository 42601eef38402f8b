"""Scores of the clients, and the new global parameters as a weighted mean of their updates."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.ops.operator import check_floating, operator
from fdcr_fast.ops.tiles import check_clients, check_numbers, column_blocks


def _check_scores(clients: int, alpha: Tensor, totals: Tensor) -> None:
    check_numbers("alpha", alpha, clients)
    check_numbers("totals", totals, 2 * clients + 1)


def _check_single(single: bool, updates: Tensor, fishers: Tensor | None) -> None:
    dtypes = {x.dtype for x in (updates, fishers) if x is not None}
    torch._check(not single or torch.float64 not in dtypes, lambda: "single is not for float64 updates or fishers")


def _check_discrepancy(
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    alpha: Tensor,
    totals: Tensor,
    num_params: int,
    single: bool,
) -> None:
    check_clients(num_params, updates, fishers, fisher_min, fisher_max)
    _check_scores(updates.shape[1], alpha, totals)
    _check_single(single, updates, fishers)


def _fake_discrepancy(updates: Tensor, *_: object) -> Tensor:
    return updates.new_empty(2 * updates.shape[1] + 1, dtype=torch.float64)


@operator(check=_check_discrepancy, fake=_fake_discrepancy, gpu_kernels=("cuda", "triton"))
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
    """Sums of squared distances of the reweighted updates to their mean (paper eq. 8 and 9, times ``P``).

    ``S_k = sum_v (u_v - u_{k,v})^2`` with ``u_k = I_k * updates_k``, ``u = sum_k alpha_k u_k`` and
    ``I_k = (F_k - min F_k) / (max F_k - min F_k)``; beside them ``N_k = sum_v updates_{k,v}^2`` and ``sum_v u_v^2``.

    The CPU kernels sum every ``max(1, STRETCH // L)`` tiles by themselves and then add them to the totals, in order:
    a round has the same bits if it is given in spans of a multiple of so many tiles.

    Args:
        updates: Tiled client matrix ``[T, K, L]``.
        fishers: Tiled like ``updates``, or None for ``I = 1``.
        fisher_min: ``[K]`` float64 from :func:`importance_range`, or None without ``fishers``.
        fisher_max: ``[K]`` float64, as ``fisher_min``.
        alpha: ``[K]`` float64 shares of the clients. A client with share 0 is not read; its results are NaN.
        totals: ``[2 K + 1]`` float64, to which is added: zeros, or the result for the parameters before these.
        num_params: ``P``.
        single: Whether products may be formed in float32, which is faster: every square and product of an update, and
            ``1 / (max F - min F)``, must be far from the limits of float32, and nothing may be float64. Otherwise
            everything is computed in float64.

    Returns:
        ``totals + (S_1, ..., S_K, N_1, ..., N_K, sum_v u_v^2)``.
    """
    clients, read = len(alpha), alpha != 0
    result = totals.clone()  # to which tile after tile is added, so that spans give the bits of one reading
    distance, norm, mean_square = result[:clients], result[clients:-1], result[-1:]
    distance[~read] = norm[~read] = torch.nan
    for block, tile in column_blocks(updates, num_params):
        u = block[read].double()
        norm[read] += u.square().sum(1)
        if fishers is not None and fisher_min is not None and fisher_max is not None:
            u *= _importance(fishers, tile, read, fisher_min, fisher_max)
        mean = alpha[read] @ u
        mean_square += mean.square().sum()
        distance[read] += (mean - u).square_().sum(1)
    return result


def check_global(global_params: Tensor) -> None:
    """Refuse global parameters that are no vector of floating numbers."""
    check_floating(global_params=global_params)
    torch._check(global_params.dim() == 1, lambda: f"expected global_params [P], got {tuple(global_params.shape)}")


def _check_rescaled_mean(
    global_params: Tensor,
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    weights: Tensor,
    single: bool,
) -> None:
    check_global(global_params)
    check_clients(global_params.numel(), updates, fishers, fisher_min, fisher_max, weights)
    _check_single(single, updates, fishers)


def fake_params(global_params: Tensor, *_: object) -> Tensor:
    """New global parameters, without data."""
    return torch.empty_like(global_params, memory_format=torch.contiguous_format)


@operator(check=_check_rescaled_mean, fake=fake_params, gpu_kernels=("cuda", "triton"))
def rescaled_mean(
    global_params: Tensor,
    updates: Tensor,
    fishers: Tensor | None,
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    weights: Tensor,
    single: bool,
) -> Tensor:
    """New global parameters from weighted, rescaled updates (paper eq. 12 and Algorithm 1).

    ``w + sum_k weights_k * 2 sigmoid(I_k) * updates_k``, the factor 1 without ``fishers``. Sums of more than 16 clients
    are formed in float64; a result beyond the largest number of its dtype becomes that number.

    Args:
        global_params: ``w [P]``.
        updates: Tiled client matrix ``[T, K, L]``.
        fishers: Tiled like ``updates``, or None for no rescaling.
        fisher_min: ``[K]`` float64 from :func:`importance_range`, or None without ``fishers``.
        fisher_max: ``[K]`` float64, as ``fisher_min``.
        weights: ``[K]`` float64. A client with weight 0 is not read.
        single: As in :func:`discrepancy`.

    Returns:
        ``[P]``, dtype of ``global_params``.
    """
    read = weights != 0
    result = torch.empty_like(global_params, memory_format=torch.contiguous_format)
    limit = torch.finfo(result.dtype).max
    start = 0
    for block, tile in column_blocks(updates, global_params.numel()):
        delta = block[read].double()
        if fishers is not None and fisher_min is not None and fisher_max is not None:
            delta *= 2 * torch.sigmoid(_importance(fishers, tile, read, fisher_min, fisher_max))
        stop = start + block.shape[1]
        result[start:stop] = (global_params[start:stop].double() + weights[read] @ delta).clamp_(-limit, limit)
        start = stop
    return result


def _check_discrepancy_and_mean(
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
) -> None:
    _check_rescaled_mean(global_params, updates, fishers, fisher_min, fisher_max, weights, single)
    _check_scores(updates.shape[1], alpha, totals)
    torch._check(fishers is not None or not (reweight or rescale), lambda: "importances need fishers")


def _fake_discrepancy_and_mean(global_params: Tensor, updates: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_discrepancy(updates), fake_params(global_params)


@operator(check=_check_discrepancy_and_mean, fake=_fake_discrepancy_and_mean, gpu_kernels=("cuda", "triton"))
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
    """:func:`discrepancy` and :func:`rescaled_mean` from one reading of the clients, with the same bits.

    Args:
        global_params: As in :func:`rescaled_mean`, and so are ``updates``, ``fishers``, ``fisher_min``,
            ``fisher_max`` and ``weights``.
        alpha: As in :func:`discrepancy`, and so are ``totals`` and ``single``.
        reweight: Whether scores take importances, which need ``fishers``; else ``u_k = updates_k``.
        rescale: Whether the mean takes them.

    Returns:
        ``(totals, params)``.
    """
    importances, none = (fishers, fisher_min, fisher_max), (None, None, None)
    reweighted, rescaled = importances if reweight else none, importances if rescale else none
    return (
        discrepancy.reference(updates, *reweighted, alpha, totals, global_params.numel(), single),
        rescaled_mean.reference(global_params, updates, *rescaled, weights, single),
    )


def _check_norms_and_mean(
    global_params: Tensor, updates: Tensor, weights: Tensor, totals: Tensor, single: bool
) -> None:
    _check_rescaled_mean(global_params, updates, None, None, None, weights, single)
    check_numbers("totals", totals, updates.shape[1])


def _fake_norms_and_mean(
    global_params: Tensor, updates: object, weights: object, totals: Tensor, single: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(totals, memory_format=torch.contiguous_format), fake_params(global_params)


@operator(check=_check_norms_and_mean, fake=_fake_norms_and_mean)
def norms_and_mean(
    global_params: Tensor, updates: Tensor, weights: Tensor, totals: Tensor, single: bool
) -> tuple[Tensor, Tensor]:
    """Squared norms of the updates and :func:`rescaled_mean` without Fishers from one reading, with the same bits.

    The norms have the bits of those of :func:`discrepancy`.

    Args:
        global_params: As in :func:`rescaled_mean`, and so are ``updates``, ``weights`` and ``single``.
        updates: Tiled client matrix ``[T, K, L]``.
        weights: ``[K]`` float64. A client with weight 0 is not read; its norm is NaN.
        totals: ``[K]`` float64, to which is added: zeros, or the result for the parameters before these.
        single: As in :func:`discrepancy`.

    Returns:
        ``(totals + sum_v updates_{k,v}^2, params)``.
    """
    read, norms = weights != 0, totals.clone(memory_format=torch.contiguous_format)
    norms[~read] = torch.nan
    for block, _ in column_blocks(updates, global_params.numel()):
        norms[read] += block[read].double().square().sum(1)
    return norms, rescaled_mean.reference(global_params, updates, None, None, None, weights, single)


def _importance(
    fishers: Tensor, tile: tuple[int, slice], read: Tensor, fisher_min: Tensor, fisher_max: Tensor
) -> Tensor:
    """Importances ``(F_k - min F_k) / (max F_k - min F_k)`` of the clients that are read, in one block of columns."""
    t, columns = tile
    low, high = fisher_min[read, None], fisher_max[read, None]
    return (fishers[t, :, columns][read].double() - low) / (high - low)
