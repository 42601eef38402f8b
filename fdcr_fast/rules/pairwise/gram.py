"""Inner products of all pairs of clients: what rules that compare clients with each other need, and all they need.

A Gram matrix ``G`` gives cosines, ``G_ij / sqrt(G_ii G_jj)``, and squared distances, ``G_ii + G_jj - 2 G_ij``.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.ops.gram import GRAM_TRANSFORMS
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shard import WHOLE, Shard
from fdcr_fast.round.tiles import ClientTiles, MatrixTiles, Span
from fdcr_fast.store.update_store import UpdateStore

Ranges = Sequence[slice | tuple[int, int]]

_SAMPLED_BLOCK = 16  # parameters that are sampled together: a cache line of float32
_SAMPLE_GROUPS = 16  # their spread tells the standard error


@dataclass(frozen=True)
class GramView:
    """One way to look at the clients.

    Attributes:
        transform: What a client's row ``x_k`` is. ``"update"``: ``delta_k``. ``"fisher_update"``:
            ``sqrt(F_k) delta_k``, whose norm is the update's length in the metric of its own Fisher.
            ``"reweighted_update"``: ``I_k delta_k`` as in FDCR, ``I_k = (F_k - min F_k) / (max F_k - min F_k)``.
            ``"fourth_root_fisher"``: ``F_k^(1/4)``, whose cosines tell how alike the Fishers are.
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

    Rows are transformed as they are read; no matrix as large as the data is made. The same data give the same bits: for
    any number of threads, and in one piece or streamed.

    With ``precision="float32"`` products are summed in float32 over at most 512 parameters, in several sums of at most
    128 each, and from there in float64. An element is then off by at most ``1e-5 sum_v |x_i[v] x_j[v]| + 1e-18 |x_i|
    |x_j|``, typically by less than a hundredth of that; huge and denormal rows neither overflow nor vanish. A distance
    computed from ``G`` carries the error of its large terms: where clients may be nearly equal, take
    ``precision="float64"``, which takes up to twice the time, and where an element is off by at most ``(200 + n) 2^-53
    sum_v |x_i[v] x_j[v]|``, ``n`` the number of tiles, longer ones counted once per 4096 parameters. Data in float64
    are always computed in float64.

    Args:
        updates: ``delta_k`` in the rows of ``[K, P]`` (any strides, never copied), or a store or a round, which hold
            the Fishers as well.
        fishers: ``F_k`` in the rows of ``[K, P]``; needed by all transforms but ``"update"``.
        views: One matrix each.
        precision: ``"float32"`` or ``"float64"``.

    Returns:
        float64 ``[len(views), K, K]``, symmetric. Clients that a round has rejected are not read; their rows and
        columns are NaN. Non-finite entries of a client, negative ones of its Fisher under a root, or a constant Fisher
        where its importance is needed, make its row and column non-finite, and no others.

    Raises:
        TypeError: a matrix is not a floating-point tensor.
        ValueError: shapes or devices do not fit, Fishers are missing, there are no clients, or a view has an unknown
            transform, or ranges that overlap or leave the parameters.
    """
    transforms = [view.transform for view in views]
    clients = _Clients.of(updates, fishers, transforms)
    ranges = [_ordered(view.ranges, clients.num_params) for view in views]
    return _grams(clients, transforms, ranges, precision)


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
    groups, Wolter, "Introduction to Variance Estimation", chapter 2): its square is unbiased, too, and has 15 degrees
    of freedom. Where few parameters carry most of a sum, samples that miss them underestimate both.

    Args:
        updates: See :func:`grams`.
        fishers: See :func:`grams`.
        sample: How many parameters, rounded up to a multiple of 256. All of them give the exact matrix.
        seed: Seed of the draw: the same seed, number of parameters and ranges draw the same parameters.
        transform: See :class:`GramView`.
        ranges: See :class:`GramView`.
        precision: See :func:`grams`.

    Raises:
        TypeError: see :func:`grams`.
        ValueError: see :func:`grams`; or ``sample`` is less than 1.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    clients = _Clients.of(updates, fishers, [transform])
    bounds = _ordered(ranges, clients.num_params)
    blocks = (bounds[:, 1] - bounds[:, 0] + _SAMPLED_BLOCK - 1) // _SAMPLED_BLOCK  # of each range
    behind = blocks.cumsum(0)
    N, of_group = int(blocks.sum()), -(-sample // (_SAMPLED_BLOCK * _SAMPLE_GROUPS))
    m = of_group * _SAMPLE_GROUPS
    if m >= N:
        exact = _grams(clients, [transform], [bounds], precision)[0]
        return GramEstimate(exact, exact * 0)
    drawn = torch.tensor(random.Random(seed).sample(range(N), m)).view(_SAMPLE_GROUPS, of_group).sort().values
    of_range = torch.searchsorted(behind, drawn, right=True)
    start = bounds[of_range, 0] + (drawn - (behind - blocks)[of_range]) * _SAMPLED_BLOCK
    stop = torch.minimum(start + _SAMPLED_BLOCK, bounds[of_range, 1])
    groups = list(torch.stack([start, stop], 2))
    estimates = _grams(clients, [transform] * _SAMPLE_GROUPS, groups, precision) * (N / of_group)
    return GramEstimate(estimates.mean(0), (estimates.var(0) * ((1 - m / N) / _SAMPLE_GROUPS)).sqrt())


@dataclass(frozen=True)
class _Clients:
    """What a Gram matrix needs of a round; ``low`` and ``high`` are NaN where nobody will read them."""

    tiles: ClientTiles
    valid: Tensor
    low: Tensor | None
    high: Tensor | None
    num_params: int
    shard: Shard = WHOLE

    @classmethod
    def of(
        cls, given: Tensor | UpdateStore | ClientUpdates, fishers: Tensor | None, transforms: Collection[str]
    ) -> _Clients:
        for transform in transforms:
            if transform not in GRAM_TRANSFORMS:
                raise ValueError(f"transform must be one of {sorted(GRAM_TRANSFORMS)}, got {transform!r}")
        if isinstance(given, UpdateStore):
            given = given.client_updates()
        if isinstance(given, ClientUpdates):
            if fishers is not None:
                raise TypeError("a store or a round holds its fishers: give it alone")
            if not given.clients:
                raise ValueError("expected at least one client, got none")
            on = given.on_device()
            clients = cls(given.tiles, given.valid, on.fisher_min, on.fisher_max, given.num_params, given.shard)
        else:
            tiles = MatrixTiles.of(given, fishers)
            valid, low, high = torch.ones(len(given), dtype=torch.bool), None, None
            if tiles.fishers is not None and "reweighted_update" in transforms:
                low, high = ops.importance_range(tiles.fishers, tiles.num_params)
            elif tiles.fishers is not None:
                low = high = tiles.fishers.new_full((len(given),), torch.nan, dtype=torch.float64)
            clients = cls(tiles, valid, low, high, tiles.num_params)
        reading = sorted({*transforms} - {"update"})
        if reading and not clients.tiles.with_fishers:
            raise ValueError(f"{', '.join(reading)} takes Fishers: fishers must be given")
        return clients


def _grams(clients: _Clients, transforms: Sequence[str], ranges: Sequence[Tensor], precision: str) -> Tensor:
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision must be 'float32' or 'float64', got {precision!r}")
    K = len(clients.valid)

    def read(span: Span, total: Tensor) -> Tensor:
        return ops.gram(
            span.updates,
            span.fishers,
            clients.low,
            clients.high,
            clients.valid,
            transforms,
            [clients.shard.within(bounds, span) for bounds in ranges],
            total,
            span.num_params,
            precision == "float32",
        )

    zeros = torch.zeros(len(transforms), K, K, dtype=torch.float64, device=clients.tiles.device)
    return clients.shard.sum(clients.tiles.spans(), zeros, read)


def _ordered(ranges: Ranges | None, num_params: int) -> Tensor:
    """The ranges in order, int64 ``[R, 2]``."""
    if ranges is None:
        return torch.tensor([[0, num_params]])
    pairs = sorted(_pair(given, num_params) for given in ranges)
    for (_, stop), (start, _) in itertools.pairwise(pairs):
        if start < stop:
            raise ValueError(f"ranges overlap: one ends at {stop}, the next starts at {start}")
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _pair(given: slice | tuple[int, int], num_params: int) -> tuple[int, int]:
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise ValueError(f"expected slices without a step, got {given}")
        given = (0 if given.start is None else given.start, num_params if given.stop is None else given.stop)
    start, stop = (operator.index(bound) for bound in given)
    if not 0 <= start <= stop <= num_params:
        raise ValueError(f"expected ranges within {num_params} parameters, got [{start}, {stop})")
    return start, stop
