"""Inner products of all pairs of clients: what rules that compare clients with each other need, and all they need.

A Gram matrix ``G`` gives cosines, ``G_ij / sqrt(G_ii G_jj)``, and squared distances, ``G_ii + G_jj - 2 G_ij``.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.server.intake import ClientUpdates, Span, check_device, check_floating
from fdcr_fast.server.store import UpdateStore

Ranges = Iterable[slice | tuple[int, int]]

_SAMPLED_BLOCK = 16  # parameters that are sampled together: a cache line of float32
_SAMPLE_GROUPS = 16  # their spread tells the standard error


@dataclass(frozen=True)
class GramView:
    """One way to look at the clients.

    Attributes:
        transform: What a client's row ``x_k`` is. ``"update"``: ``delta_k``. ``"fisher_update"``: ``sqrt(F_k) delta_k``,
            the update in units of its Fisher length. ``"reweighted_update"``: ``I_k delta_k`` with the importance
            ``I_k = (F_k - min F_k) / (max F_k - min F_k)``, as in FDCR. ``"fourth_root_fisher"``: ``F_k^(1/4)``, whose
            cosines are the Bhattacharyya coefficients of the ``sqrt(F_k)``.
        ranges: Over which parameters: slices or pairs ``(start, stop)`` in any order, such as
            ``[layout.slices[name] for name in names]``; None for all.
    """

    transform: str = "update"
    ranges: Ranges | None = None


class GramEstimate(NamedTuple):
    """A Gram matrix from a sample of the parameters.

    Attributes:
        value: Unbiased estimate of ``G``, float64 ``[K, K]``.
        standard_error: Estimated standard deviation of each element of ``value``, float64 ``[K, K]``.
    """

    value: Tensor
    standard_error: Tensor


def gram(
    updates: Tensor | UpdateStore | ClientUpdates,
    fishers: Tensor | None = None,
    *,
    transform: str = "update",
    ranges: Ranges | None = None,
    precision: str = "float32",
) -> Tensor:
    """Inner products ``G_ij = sum_v x_i[v] x_j[v]`` of all pairs of transformed clients; see :func:`grams`.

    Args:
        updates: See :func:`grams`.
        fishers: See :func:`grams`.
        transform: See :class:`GramView`.
        ranges: See :class:`GramView`.
        precision: See :func:`grams`.

    Returns:
        ``G``, float64 ``[K, K]``, symmetric.
    """
    return grams(updates, fishers, views=[GramView(transform, ranges)], precision=precision)[0]


def grams(
    updates: Tensor | UpdateStore | ClientUpdates,
    fishers: Tensor | None = None,
    *,
    views: Sequence[GramView],
    precision: str = "float32",
) -> Tensor:
    """Gram matrices of several views of the same clients, in one pass over the data.

    Rows are transformed as they are read, and no matrix as large as the data is made. Same input, same bits: for any
    number of threads, and for data in memory or streamed.

    With ``precision="float32"`` products are summed in float32 over at most 128 parameters, and from there in float64;
    an element is off by at most ``1e-5 sum_v |x_i[v] x_j[v]|``, typically by less than a hundredth of that. Huge and
    denormal rows neither overflow nor vanish. A distance computed from ``G`` carries the error of its large terms: where
    clients may be nearly equal, take ``precision="float64"`` (error ``1e-12 sum_v |x_i[v] x_j[v]|``, nearly twice the
    time). float64 data are always computed in float64.

    Args:
        updates: ``delta_k`` in the rows of ``[K, P]`` (any strides, never copied), or a store or a round, which hold the
            Fishers as well.
        fishers: ``F_k`` in the rows of ``[K, P]``; needed by all transforms but ``"update"``.
        views: One matrix each.
        precision: ``"float32"`` or ``"float64"``.

    Returns:
        float64 ``[len(views), K, K]``, symmetric. Clients that a round has rejected are not read; their rows and columns
        are NaN. Non-finite entries of a client, negative ones of its Fisher under a root, or a constant Fisher
        where its importance is needed, make its row and column non-finite, and no others.

    Raises:
        TypeError: a matrix is not a floating-point tensor.
        ValueError: shapes or devices do not fit, Fishers are missing, there are no clients, or a view has an unknown
            transform, or ranges that overlap or leave the parameters.
    """
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision must be 'float32' or 'float64', got {precision!r}")
    for view in views:
        if view.transform not in ops.GRAM_TRANSFORMS:
            raise ValueError(f"transform must be one of {sorted(ops.GRAM_TRANSFORMS)}, got {view.transform!r}")
    needed = {view.transform for view in views}
    clients = _Clients.of(updates, fishers if needed - {"update"} else None, "reweighted_update" in needed)
    if needed - {"update"} and clients.low is None:
        raise ValueError(f"{sorted(needed - {'update'})} read Fishers: fishers must be given")
    ranges = [_ordered(view.ranges, clients.num_params) for view in views]
    K = len(clients.valid)
    total = torch.zeros(len(views), K, K, dtype=torch.float64, device=clients.device)
    for span in clients.spans:
        total = ops.gram(
            span.updates,
            span.fishers,
            clients.low,
            clients.high,
            clients.valid,
            [view.transform for view in views],
            [_within(bounds, span) for bounds in ranges],
            total,
            span.num_params,
            precision == "float64",
        )
    return total


def estimate_gram(
    updates: Tensor | UpdateStore | ClientUpdates,
    fishers: Tensor | None = None,
    *,
    sample: int,
    seed: int = 0,
    transform: str = "update",
    ranges: Ranges | None = None,
    precision: str = "float32",
) -> GramEstimate:
    """Estimate :func:`gram` from about ``sample`` of its parameters, without bias.

    The parameters are cut into ``N`` blocks of 16, of which ``m`` are drawn without replacement, all equally likely:
    ``G = N / m * sum of the drawn blocks' products``. The draw falls at random into 16 groups; the standard error is
    ``sqrt((1 - m / N) * s^2 / 16)``, with ``s^2`` the variance of the 16 estimates that the groups give alone (random
    groups, Wolter, "Introduction to Variance Estimation", chapter 2): its square is unbiased, too, and has 15 degrees of
    freedom. A few tens of thousands of parameters estimate a cosine well, unless few parameters carry most of the norm.

    Args:
        updates: See :func:`grams`.
        fishers: See :func:`grams`.
        sample: How many parameters, rounded up to a multiple of 256. All of them give the exact matrix.
        seed: Of the draw: the same seed, number of parameters and ranges draw the same parameters.
        transform: See :class:`GramView`.
        ranges: See :class:`GramView`.
        precision: See :func:`grams`.

    Raises:
        TypeError: see :func:`grams`.
        ValueError: see :func:`grams`; or ``sample`` is less than 1.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    bounds = _ordered(ranges, _num_params(updates))
    blocks = (bounds[:, 1] - bounds[:, 0] + _SAMPLED_BLOCK - 1) // _SAMPLED_BLOCK
    N, of_group = int(blocks.sum()), -(-sample // (_SAMPLED_BLOCK * _SAMPLE_GROUPS))
    m = of_group * _SAMPLE_GROUPS
    if m >= N:
        exact = gram(updates, fishers, transform=transform, ranges=ranges, precision=precision)
        return GramEstimate(exact, torch.where(exact.isnan(), exact, 0.0))
    drawn = torch.tensor(random.Random(seed).sample(range(N), m)).view(_SAMPLE_GROUPS, of_group).sort().values
    of_range = torch.searchsorted(blocks.cumsum(0), drawn, right=True)
    start = bounds[of_range, 0] + (drawn - (blocks.cumsum(0) - blocks)[of_range]) * _SAMPLED_BLOCK
    stop = torch.minimum(start + _SAMPLED_BLOCK, bounds[of_range, 1])
    groups = [
        GramView(transform, list(zip(first, last, strict=True)))
        for first, last in zip(start.tolist(), stop.tolist(), strict=True)
    ]
    estimates = grams(updates, fishers, views=groups, precision=precision) * (N / of_group)
    return GramEstimate(estimates.mean(0), (estimates.var(0) * ((1 - m / N) / _SAMPLE_GROUPS)).sqrt())


@dataclass(frozen=True)
class _Clients:
    """What a Gram matrix needs of a round; the bounds of the Fishers are NaN where nobody will read them."""

    spans: Iterable[Span]
    num_params: int
    valid: Tensor
    device: torch.device
    low: Tensor | None
    high: Tensor | None

    @classmethod
    def of(cls, updates: Tensor | UpdateStore | ClientUpdates, fishers: Tensor | None, importance: bool) -> _Clients:
        if isinstance(updates, UpdateStore):
            updates = updates.client_updates()
        if isinstance(updates, ClientUpdates):
            if fishers is not None:
                raise TypeError("a store or a round holds its fishers: give it alone")
            if not updates.clients:
                raise ValueError("expected at least one client, got none")
            device = updates.updates.device
            low, high = updates.fisher_min, updates.fisher_max
            return cls(updates.spans(), updates.num_params, updates.valid, device, low, high)
        check_floating("updates", updates, "[K, P]")
        K, P = updates.shape
        if K == 0 or P == 0:
            raise ValueError(f"expected at least one client and one parameter, got updates [{K}, {P}]")
        low = high = None
        if fishers is not None:
            check_floating("fishers", fishers, "[K, P]")
            if fishers.shape != (K, P):
                raise ValueError(f"expected fishers [{K}, {P}] like updates, got {list(fishers.shape)}")
            check_device("fishers", fishers, updates)
            fishers = fishers.detach().unsqueeze(0)
            low = high = fishers.new_full((K,), torch.nan, dtype=torch.float64)
            if importance:
                low, high = ops.importance_range(fishers, P)
        span = Span(0, P, updates.detach().unsqueeze(0), fishers)
        return cls([span], P, torch.ones(K, dtype=torch.bool), updates.device, low, high)
