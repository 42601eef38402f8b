"""Definitions of the operators: schema, contract, shape checks, fake kernels, and registration of the reference.

Conventions. ``N`` samples, ``T`` positions (tokens, pixels), ``K`` clients, ``P`` parameters. Floating tensors may be
float64, float32, bfloat16 or float16, with any strides. A *tiled client matrix* is a tensor ``X [T, K, L]`` where
parameter ``p`` of client ``k`` is ``X[p // L, k, p % L]``; what lies behind parameter ``P - 1`` in the last tile is
never read. A plain ``[K, P]`` matrix is the tiled matrix ``x.unsqueeze(0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fdcr_fast.ops import reference
from fdcr_fast.ops.network_schemas import NETWORK_OPERATORS

_library = torch.library.Library("fdcr_fast", "FRAGMENT")

STRETCH = 4096  # kStretch of csrc/cpu/aggregation.inc: how many parameters scores are summed over before they are added


def sum_squared_grads_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of a linear layer, summed over the samples.

    ``weight[o, i] = sum_n (sum_t grad_output[n, t, o] * input[n, t, i])^2``,
    ``bias[o] = sum_n (sum_t grad_output[n, t, o])^2``.

    Args:
        grad_output: ``[N, T, O]``, gradient of the loss at the layer's output.
        input: ``[N, T, I]``, the layer's input.

    Returns:
        ``(weight [O, I], bias [O])``, float64 if an argument is float64, else float32.
    """
    return cast("tuple[Tensor, Tensor]", torch.ops.fdcr_fast.sum_squared_grads_linear(grad_output, input))


def sum_squared_grads_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of a 1-, 2- or 3-dimensional convolution, summed over the samples.

    ``weight[o, c, k] = sum_n (sum_s grad_output[n, o, s] * x[n, c, stride * s + dilation * k])^2`` with ``x`` the
    zero-padded channels of o's group, ``bias[o] = sum_n (sum_s grad_output[n, o, s])^2``.

    Args:
        grad_output: ``[N, O, *output]``, gradient of the loss at the layer's output.
        input: ``[N, C, *size]``, the layer's input.
        kernel_size: Its length is the number of spatial dimensions, 1 to 3.
        stride: One number per spatial dimension; likewise ``padding`` (zeros, both sides) and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: Divides both channel counts.

    Returns:
        ``(weight [O, C / groups, *kernel_size], bias [O])``, float64 if an argument is float64, else float32.
    """
    return cast(
        "tuple[Tensor, Tensor]",
        torch.ops.fdcr_fast.sum_squared_grads_conv(grad_output, input, kernel_size, stride, padding, dilation, groups),
    )


def sum_squared_grads_norm(
    grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of the scale and shift of a norm layer, summed over the samples.

    ``weight[g, c] = sum_n (sum_ts grad_output[n, t, g, c, s] * (input[n, t, g, c, s] - m) / sqrt(v + eps))^2``,
    ``bias[g, c] = sum_n (sum_ts grad_output[n, t, g, c, s])^2``. The statistics ``m`` and ``v`` belong to ``(n, t, g)``
    and are taken over its channels and pixels, unless they are given.

    Args:
        grad_output: ``[N, T, G, C, S]``, gradient of the loss at the layer's output: ``T`` positions with statistics of
            their own, ``G`` groups of ``C`` channels, ``S`` pixels.
        input: ``[N, T, G, C, S]``, the layer's input.
        mean: ``m [G, C]``, or None for the mean of the input.
        variance: ``v [G, C]``, or None for the mean squared distance of the input from ``m``.
        eps: Added to ``v``.

    Returns:
        ``(weight [G, C], bias [G, C])``, float64 if ``grad_output`` or ``input`` is float64, else float32.
    """
    return cast(
        "tuple[Tensor, Tensor]",
        torch.ops.fdcr_fast.sum_squared_grads_norm(grad_output, input, mean, variance, eps),
    )


def sum_squared_grads_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    """Squared per-sample gradients of an embedding table, summed over the samples.

    ``result[v] = sum_n (sum_{t: indices[n, t] = v} grad_output[n, t])^2``. The work grows with ``N * T + V``.

    Args:
        grad_output: ``[N, T, D]``, gradient of the loss at the looked up rows.
        indices: ``[N, T]`` int64, less than ``num_embeddings``; negative ones are skipped.
        num_embeddings: ``V``.

    Returns:
        ``[V, D]``, float64 if ``grad_output`` is float64, else float32.
    """
    return cast(Tensor, torch.ops.fdcr_fast.sum_squared_grads_embedding(grad_output, indices, num_embeddings))


def fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> Tensor:
    """Copy a vector into one client's row of a tiled client matrix, and take statistics of it, in one pass.

    Number ``p`` of the concatenated ``values``, less ``base[p]``, goes to ``row[p // L, p % L]``, rounded to its dtype;
    what lies behind the last number is not touched. The statistics are those of the rounded numbers, NaN if any of them
    is NaN.

    Args:
        values: Vectors that make up one vector ``[P]``; floating, any strides and dtypes.
        row: ``[T, L]``, floating; written.
        statistics: Of the numbers before these: float64 ``(squared norm, smallest, largest)``; ``(0, inf, -inf)`` where
            there are none. The compiled kernels give a vector that is copied in parts of a multiple of
            :data:`STRETCH` numbers, in order, the same bits as in one, for any tiles.
        base: ``[P]``, float32 or float64; the values are rounded to its dtype before it is taken from them. None for
            zeros.

    Returns:
        ``[3]`` float64, the statistics with these numbers.
    """
    return cast(Tensor, torch.ops.fdcr_fast.fill_row(list(values), row, statistics, base))


def fill_rows(values: Sequence[Tensor], rows: Tensor, base: Tensor | None = None) -> None:
    """Copy the vectors of all clients into a tiled client matrix, as :func:`fill_row` does with one of them.

    Args:
        values: Vectors that make up those of the clients ``[P]``, one client after the other; floating, any strides and
            dtypes.
        rows: Tiled client matrix ``[T, K, L]`` with at least one client; written.
        base: As in :func:`fill_row`.
    """
    torch.ops.fdcr_fast.fill_rows(list(values), rows, base)


def importance_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of every client's diagonal Fisher (paper eq. 6); NaN if any entry is NaN.

    Args:
        fishers: Tiled client matrix ``[T, K, L]``.
        num_params: ``P``, at least 1.

    Returns:
        ``(min [K], max [K])``, float64.
    """
    return cast("tuple[Tensor, Tensor]", torch.ops.fdcr_fast.importance_range(fishers, num_params))


def squared_norm(updates: Tensor, num_params: int) -> Tensor:
    """Squared Euclidean norm of every client's update, summed in float64; NaN and infinity propagate.

    Args:
        updates: Tiled client matrix ``[T, K, L]``.
        num_params: ``P``.

    Returns:
        ``[K]``, float64.
    """
    return cast(Tensor, torch.ops.fdcr_fast.squared_norm(updates, num_params))


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
        fisher_max: Likewise.
        alpha: ``[K]`` float64 shares of the clients. A client with share 0 is not read; its results are NaN.
        totals: ``[2 K + 1]`` float64, to which is added: zeros, or the result for the parameters before these.
        num_params: ``P``.
        single: Whether products may be formed in float32, which is faster: every square and product of an update, and
            ``1 / (max F - min F)``, must be far from the limits of float32, and nothing may be float64. Otherwise
            everything is computed in float64.

    Returns:
        ``totals + (S_1, ..., S_K, N_1, ..., N_K, sum_v u_v^2)``.
    """
    return cast(
        Tensor,
        torch.ops.fdcr_fast.discrepancy(updates, fishers, fisher_min, fisher_max, alpha, totals, num_params, single),
    )


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
        fisher_max: Likewise.
        weights: ``[K]`` float64. A client with weight 0 is not read.
        single: As in :func:`discrepancy`.

    Returns:
        ``[P]``, dtype of ``global_params``.
    """
    return cast(
        Tensor,
        torch.ops.fdcr_fast.rescaled_mean(global_params, updates, fishers, fisher_min, fisher_max, weights, single),
    )


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
    return cast(
        "tuple[Tensor, Tensor]",
        torch.ops.fdcr_fast.discrepancy_and_mean(
            global_params, updates, fishers, fisher_min, fisher_max, alpha, weights, totals, reweight, rescale, single
        ),
    )


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
    return cast(Tensor, torch.ops.fdcr_fast.central_mean(global_params, updates, read, keep, nearest))


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
    """Inner products of all pairs of transformed clients, for several views of them in one pass.

    ``total[m, i, j] + sum_v x_i[v] x_j[v]`` with ``v`` in the ranges of view ``m`` and ``x_k[v]`` by its transform

    - ``"update"``: ``updates_k[v]``
    - ``"fisher_update"``: ``sqrt(F_k[v]) * updates_k[v]``
    - ``"reweighted_update"``: ``I_k[v] * updates_k[v]``, ``I_k = (F_k - min F_k) / (max F_k - min F_k)``
    - ``"fourth_root_fisher"``: ``F_k[v]^(1/4)``

    Computed in float64 if ``float64`` is set or any data are float64. Else entries and products are float32, summed in
    float32 over at most 128 parameters and from there in float64; a client's entries are divided by a power of two
    there, if their products could leave the range of float32; :func:`fdcr_fast.grams` states the error. NaN, infinity,
    the root of a negative Fisher entry, and the importance of a constant Fisher make the row and column of that client
    non-finite, and no others. ``total`` threaded through successive spans of a multiple of ``max(1, STRETCH // L)``
    tiles gives the same bits as one call for all of them, except by kernels on GPUs.

    Args:
        updates: Tiled client matrix ``[T, K, L]``.
        fishers: Tiled like ``updates``, or None where all transforms are ``"update"``.
        fisher_min: ``[K]`` float64 over all parameters, not only those given here; read by ``"reweighted_update"``
            alone. None without ``fishers``.
        fisher_max: Likewise.
        read: bool ``[K]``, on the CPU. The rows and columns of the other clients, which are not read, are NaN.
        transforms: One name for each of ``M`` views.
        ranges: For each view int64 ``[R, 2]`` on the CPU: ranges ``[start, stop)`` of the ``P`` parameters, ascending
            and disjoint.
        total: ``[M, K, K]`` float64, symmetric.
        num_params: ``P``.
        float64: Whether to compute in float64 throughout.

    Returns:
        ``[M, K, K]``, float64, symmetric.
    """
    return cast(
        Tensor,
        torch.ops.fdcr_fast.gram(
            updates, fishers, fisher_min, fisher_max, read, transforms, ranges, total, num_params, float64
        ),
    )


# --- what each operator accepts ---------------------------------------------------------------------------------------


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        message = f"{name} must be floating point, got {tensor.dtype}"
        torch._check(tensor.is_floating_point(), partial(str, message))


def _check_linear(grad_output: Tensor, input: Tensor) -> None:
    _check_floating(grad_output=grad_output, input=input)
    torch._check(
        grad_output.dim() == 3 and input.dim() == 3 and grad_output.shape[:2] == input.shape[:2],
        lambda: (
            f"expected grad_output [N, T, O] and input [N, T, I], got {tuple(grad_output.shape)} and "
            f"{tuple(input.shape)}"
        ),
    )


def _check_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _check_floating(grad_output=grad_output, input=input)
    dims = len(kernel_size)
    torch._check(
        1 <= dims <= 3 and len(stride) == len(padding) == len(dilation) == dims,
        lambda: f"expected 1 to 3 spatial dimensions, got kernel_size {list(kernel_size)}",
    )
    torch._check(
        min(*kernel_size, *stride, *dilation, groups) > 0 and min(padding) >= 0,
        lambda: "kernel_size, stride, dilation and groups must be positive, padding not negative",
    )
    torch._check(
        grad_output.dim() == input.dim() == dims + 2 and grad_output.shape[0] == input.shape[0],
        lambda: (
            f"expected grad_output [N, O, *output] and input [N, C, *size] with {dims} spatial dimensions, got "
            f"{tuple(grad_output.shape)} and {tuple(input.shape)}"
        ),
    )
    torch._check(
        grad_output.shape[1] % groups == 0 and input.shape[1] % groups == 0,
        lambda: f"groups = {groups} must divide {grad_output.shape[1]} and {input.shape[1]} channels",
    )
    expected = [
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in range(dims)
    ]
    torch._check(
        list(grad_output.shape[2:]) == expected,
        lambda: f"expected grad_output of spatial size {expected}, got {list(grad_output.shape[2:])}",
    )


def _check_norm(grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> None:
    _check_floating(grad_output=grad_output, input=input)
    torch._check(
        grad_output.shape == input.shape and input.dim() == 5,
        lambda: (
            f"expected grad_output and input [N, T, G, C, S], got {tuple(grad_output.shape)} and {tuple(input.shape)}"
        ),
    )
    for name, given in (("mean", mean), ("variance", variance)):
        if given is not None:
            _check_floating(**{name: given})
            message = f"expected {name} {tuple(input.shape[2:4])}, got {tuple(given.shape)}"
            torch._check(given.shape == input.shape[2:4], partial(str, message))


def _check_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> None:
    _check_floating(grad_output=grad_output)
    torch._check(indices.dtype == torch.int64, lambda: f"indices must be int64, got {indices.dtype}")
    torch._check(
        grad_output.dim() == 3 and indices.shape == grad_output.shape[:2],
        lambda: (
            f"expected grad_output [N, T, D] and indices [N, T], got {tuple(grad_output.shape)} and "
            f"{tuple(indices.shape)}"
        ),
    )
    torch._check(num_embeddings >= 0, lambda: f"num_embeddings must not be negative, got {num_embeddings}")


def _check_fill_rows(values: Sequence[Tensor], rows: Tensor, base: Tensor | None = None) -> None:
    for piece in values:
        _check_floating(values=piece)
        torch._check(piece.dim() == 1, partial("values must be vectors, got {}".format, tuple(piece.shape)))
    torch._check(rows.dim() == 3, lambda: f"expected a client matrix [T, K, L], got {tuple(rows.shape)}")
    numbers, clients = sum(piece.shape[0] for piece in values), rows.shape[1]
    torch._check(
        clients > 0 and numbers % clients == 0, lambda: f"{numbers} numbers are not {clients} vectors of one length"
    )
    num_params = numbers // clients
    _check_clients(num_params, rows)
    if base is not None:
        torch._check(
            base.dtype in (torch.float32, torch.float64) and base.shape == (num_params,),
            lambda: f"base must be float32 or float64 [{num_params}], got {base.dtype} {tuple(base.shape)}",
        )


def _check_fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> None:
    torch._check(row.dim() == 2, lambda: f"expected a row [T, L], got {tuple(row.shape)}")
    _check_fill_rows(values, row[:, None], base)
    torch._check(
        statistics.dtype == torch.float64 and statistics.shape == (3,),
        lambda: f"statistics must be float64 [3], got {statistics.dtype} {tuple(statistics.shape)}",
    )


def _check_clients(
    num_params: int,
    updates: Tensor,
    fishers: Tensor | None = None,
    fisher_min: Tensor | None = None,
    fisher_max: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """The part of the contract that all operators on tiled client matrices share."""
    _check_floating(clients=updates)
    torch._check(updates.dim() == 3, lambda: f"expected a client matrix [T, K, L], got {tuple(updates.shape)}")
    tiles, clients, length = updates.shape
    torch._check(
        num_params >= 0 and (tiles - 1) * length < max(num_params, 1) <= max(tiles * length, 1),
        lambda: f"{tiles} tiles of {length} do not hold exactly {num_params} parameters",
    )
    torch._check(
        (fishers is None) == (fisher_min is None) == (fisher_max is None),
        lambda: "fishers, fisher_min and fisher_max go together",
    )
    if fishers is not None:
        _check_floating(fishers=fishers)
        torch._check(
            fishers.shape == updates.shape,
            lambda: f"fishers {tuple(fishers.shape)} differ in shape from updates {tuple(updates.shape)}",
        )
    for name, vector in (("fisher_min", fisher_min), ("fisher_max", fisher_max), ("weights", weights)):
        if vector is not None:
            message = f"{name} must be float64 [{clients}], got {vector.dtype} {tuple(vector.shape)}"
            torch._check(vector.dtype == torch.float64 and vector.shape == (clients,), partial(str, message))


def _check_range(fishers: Tensor, num_params: int) -> None:
    torch._check(num_params >= 1, lambda: f"the range of {num_params} parameters is undefined")
    _check_clients(num_params, fishers)


def _check_squared_norm(updates: Tensor, num_params: int) -> None:
    _check_clients(num_params, updates)


def _check_scores(clients: int, alpha: Tensor, totals: Tensor) -> None:
    for name, vector, size in (("alpha", alpha, clients), ("totals", totals, 2 * clients + 1)):
        message = f"{name} must be float64 [{size}], got {vector.dtype} {tuple(vector.shape)}"
        torch._check(vector.dtype == torch.float64 and vector.shape == (size,), partial(str, message))


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
    _check_clients(num_params, updates, fishers, fisher_min, fisher_max)
    _check_scores(updates.shape[1], alpha, totals)
    _check_single(single, updates, fishers)


def _check_global(global_params: Tensor) -> None:
    _check_floating(global_params=global_params)
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
    _check_global(global_params)
    _check_clients(global_params.numel(), updates, fishers, fisher_min, fisher_max, weights)
    _check_single(single, updates, fishers)


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


def _check_read(read: Tensor, clients: int) -> None:
    torch._check(
        read.dtype == torch.bool and read.shape == (clients,),
        lambda: f"read must be bool [{clients}], got {read.dtype} {tuple(read.shape)}",
    )


def _check_central_mean(global_params: Tensor, updates: Tensor, read: Tensor, keep: int, nearest: bool) -> None:
    _check_global(global_params)
    _check_clients(global_params.numel(), updates)
    _check_read(read, updates.shape[1])
    torch._check(keep >= 1, lambda: f"keep must be at least 1, got {keep}")


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
    float64: bool,
) -> None:
    _check_clients(num_params, updates, fishers, fisher_min, fisher_max)
    clients = updates.shape[1]
    _check_read(read, clients)
    for transform in transforms:
        message = f"unknown transform {transform}, expected one of {sorted(reference.GRAM_TRANSFORMS)}"
        torch._check(transform in reference.GRAM_TRANSFORMS, partial(str, message))
        message = f"{transform} reads Fishers, and there are none"
        torch._check(transform == "update" or fishers is not None, partial(str, message))
    torch._check(len(ranges) == len(transforms), lambda: f"expected ranges for each of {len(transforms)} transforms")
    for given in ranges:
        message = f"ranges must be int64 [R, 2], got {given.dtype} {tuple(given.shape)}"
        torch._check(given.dtype == torch.int64 and given.dim() == 2 and given.shape[1] == 2, partial(str, message))
    expected = (len(transforms), clients, clients)
    torch._check(
        total.dtype == torch.float64 and total.shape == expected,
        lambda: f"total must be float64 {expected}, got {total.dtype} {tuple(total.shape)}",
    )


# --- fake kernels: shapes and dtypes without data ---------------------------------------------------------------------


def _fake_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(grad_output, input)
    out = grad_output.shape[2]
    return input.new_empty(out, input.shape[2], dtype=dtype), input.new_empty(out, dtype=dtype)


def _fake_conv(grad_output: Tensor, input: Tensor, kernel_size: Sequence[int], *geometry: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(grad_output, input)
    out, columns = grad_output.shape[1], input.shape[1] // geometry[-1]
    return input.new_empty(out, columns, *kernel_size, dtype=dtype), input.new_empty(out, dtype=dtype)


def _fake_norm(grad_output: Tensor, input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(grad_output, input)
    return input.new_empty(input.shape[2:4], dtype=dtype), input.new_empty(input.shape[2:4], dtype=dtype)


def _fake_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    dtype = reference.accumulation_dtype(grad_output)
    return grad_output.new_empty(num_embeddings, grad_output.shape[2], dtype=dtype)


def _fake_fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> Tensor:
    return torch.empty_like(statistics)


def _fake_fill_rows(*_: object) -> None:
    return None


def _fake_range(fishers: Tensor, num_params: int) -> tuple[Tensor, Tensor]:
    return _per_client(fishers), _per_client(fishers)


def _per_client(clients: Tensor, *_: object) -> Tensor:
    return clients.new_empty(clients.shape[1], dtype=torch.float64)


def _fake_discrepancy(updates: Tensor, *_: object) -> Tensor:
    return updates.new_empty(2 * updates.shape[1] + 1, dtype=torch.float64)


def _fake_rescaled_mean(global_params: Tensor, *_: object) -> Tensor:
    return torch.empty_like(global_params, memory_format=torch.contiguous_format)


def _fake_discrepancy_and_mean(global_params: Tensor, updates: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_discrepancy(updates), _fake_rescaled_mean(global_params)


def _fake_gram(*args: Any) -> Tensor:
    return torch.empty_like(args[7], memory_format=torch.contiguous_format)


# --- registration -----------------------------------------------------------------------------------------------------

_CLIENTS = "Tensor updates, Tensor? fishers, Tensor? fisher_min, Tensor? fisher_max"

OPERATORS: dict[str, tuple[str, Callable[..., None], Callable[..., Any]]] = {
    "sum_squared_grads_linear": (
        "(Tensor grad_output, Tensor input) -> (Tensor, Tensor)",
        _check_linear,
        _fake_linear,
    ),
    "sum_squared_grads_conv": (
        "(Tensor grad_output, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "int groups) -> (Tensor, Tensor)",
        _check_conv,
        _fake_conv,
    ),
    "sum_squared_grads_norm": (
        "(Tensor grad_output, Tensor input, Tensor? mean, Tensor? variance, float eps) -> (Tensor, Tensor)",
        _check_norm,
        _fake_norm,
    ),
    "sum_squared_grads_embedding": (
        "(Tensor grad_output, Tensor indices, int num_embeddings) -> Tensor",
        _check_embedding,
        _fake_embedding,
    ),
    "fill_row": (
        "(Tensor[] values, Tensor(a!) row, Tensor statistics, Tensor? base=None) -> Tensor",
        _check_fill_row,
        _fake_fill_row,
    ),
    "fill_rows": (
        "(Tensor[] values, Tensor(a!) rows, Tensor? base=None) -> ()",
        _check_fill_rows,
        _fake_fill_rows,
    ),
    "importance_range": ("(Tensor fishers, int num_params) -> (Tensor, Tensor)", _check_range, _fake_range),
    "squared_norm": ("(Tensor updates, int num_params) -> Tensor", _check_squared_norm, _per_client),
    "discrepancy": (
        f"({_CLIENTS}, Tensor alpha, Tensor totals, int num_params, bool single) -> Tensor",
        _check_discrepancy,
        _fake_discrepancy,
    ),
    "rescaled_mean": (
        f"(Tensor global_params, {_CLIENTS}, Tensor weights, bool single) -> Tensor",
        _check_rescaled_mean,
        _fake_rescaled_mean,
    ),
    "discrepancy_and_mean": (
        f"(Tensor global_params, {_CLIENTS}, Tensor alpha, Tensor weights, Tensor totals, bool reweight, "
        "bool rescale, bool single) -> (Tensor, Tensor)",
        _check_discrepancy_and_mean,
        _fake_discrepancy_and_mean,
    ),
    "central_mean": (
        "(Tensor global_params, Tensor updates, Tensor read, int keep, bool nearest) -> Tensor",
        _check_central_mean,
        _fake_rescaled_mean,
    ),
    "gram": (
        f"({_CLIENTS}, Tensor read, str[] transforms, Tensor[] ranges, Tensor total, int num_params, bool float64) "
        "-> Tensor",
        _check_gram,
        _fake_gram,
    ),
    **NETWORK_OPERATORS,
}


def checked(check: Callable[..., None], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation in Python that gets to see only what the operator accepts."""

    def call(*args: Any) -> Any:
        check(*args)
        return implementation(*args)

    return call


def _register() -> None:
    for name, (schema, check, fake) in OPERATORS.items():
        _library.define(name + schema)
        _library.impl(name, checked(check, getattr(reference, name)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fdcr_fast::{name}", checked(check, fake), lib=_library)


_register()
