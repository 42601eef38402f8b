"""Readings of all clients of a round, span by span: scores, the mean, or both at once.

Vectors over clients lie where the rows are (:meth:`ClientUpdates.on_device`), and so do results; nothing here waits for
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.memory import empty
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shard import WHOLE, Shard
from fdcr_fast.round.tiles import ClientTiles, MatrixTiles, Span
from fdcr_fast.round.vectors import arrays, zeros

Importances = tuple[Tensor | None, Tensor | None, Tensor | None]

# In float32 a product is right to 2^-24 of itself, so V, which is made of differences, to about 1e-7 of itself times
# how much larger what was subtracted is than what was left. Beyond this ratio V is computed again in float64.
_CANCELLATION = 8.0
_SAME = 1e-5  # scores that are closer together are told apart in float64 only
_FEWEST_SAMPLED = 4096  # parameters
_NOTHING = torch.zeros(0, dtype=torch.float64)
_LEAST_RMS, _MOST_NORM, _RANGE = 1e-14, 1e15, 1e30  # squares of sizes in between are far from the limits of float32


class Scores(NamedTuple):
    """What a reading tells of every client.

    Attributes:
        distance: ``S_k = sum_v (u_v - u_{k,v})^2``, float64 ``[K]``, NaN for clients that are not valid.
        squared_norm: ``sum_v delta_{k,v}^2``, float64 ``[K]``, NaN for clients that are not valid.
        mean_square: ``sum_v u_v^2``, ``[1]``.
    """

    distance: Tensor
    squared_norm: Tensor
    mean_square: Tensor


def may_fit_single(clients: ClientUpdates) -> bool:
    """What :func:`fits_single` says of rounds with numbers of usual sizes."""
    return clients.num_params >= ops.STRETCH and torch.float64 not in clients.tiles.dtypes


def least_norm(clients: ClientUpdates) -> float:
    """The norm of updates of the smallest size that float32 products are right for."""
    return _LEAST_RMS * math.sqrt(clients.num_params)


def fits_single(clients: ClientUpdates) -> bool:
    """Whether products of this round stay far from the limits of float32; small rounds are computed in float64."""
    if not may_fit_single(clients):
        return False
    rows = clients.valid_rows
    largest = math.sqrt(clients.squared_norm.numpy()[rows].max())
    if not least_norm(clients) <= largest <= _MOST_NORM:
        return False
    if clients.fisher_min is None or clients.fisher_max is None:
        return True
    low, high = clients.fisher_min.numpy()[rows], clients.fisher_max.numpy()[rows]
    return bool((high - low).min() >= 1 / _RANGE and high.max() <= _RANGE)


def trusted(scores: Scores, clients: ClientUpdates, alpha: Tensor) -> Any:
    """Whether scores from float32 products are right to about 1e-6 of themselves, and tell the clients apart."""
    xp, squares, shares, mean_square = arrays(scores.distance, alpha, scores.mean_square)
    rows = clients.valid_rows
    distance, shares = xp.sqrt(squares[rows]), shares[rows]
    smallest, largest = distance.min(), distance.max()
    rounded = 2 * xp.sqrt(mean_square) + smallest + shares @ distance
    least = smallest >= least_norm(clients)
    apart = smallest < (1 - _SAME) * largest
    return least & apart & (rounded <= _CANCELLATION * smallest)


def scores(clients: ClientUpdates, alpha: Tensor, *, reweight: bool, single: bool) -> Scores:
    """One reading for the distances of the reweighted updates to their mean."""
    totals = _no_totals(clients)
    own = _of_own_vectors(clients, None, alpha, None, totals, reweight, False, single)
    if own is not None:
        return _scores(own[0])

    def read(span: Span, totals: Tensor) -> Tensor:
        importances = _importances(clients, span, reweight)
        return ops.discrepancy(span.updates, *importances, alpha, totals, span.num_params, single)

    return _scores(clients.sum(totals, read))


def squared_norms(clients: ClientUpdates) -> Tensor:
    """One reading for the squared norms of the updates, float64 ``[K]``, of clients that are not valid too."""
    nothing = zeros(len(clients.clients), clients.tiles.device)
    return clients.sum(nothing, lambda span, total: total + ops.squared_norm(span.updates, span.num_params))


class MomentsView(NamedTuple):
    """What :func:`moments` sums; see :func:`fdcr_fast.ops.moments`.

    Attributes:
        factors: Factors ``[P]`` of the parameters that are here; None for ones.
        ranges: The model's parameters that are summed over; None for all.
        squares: Whether updates are squared.
    """

    factors: Tensor | None = None
    ranges: Sequence[slice] | None = None
    squares: bool = False


def moments(clients: ClientUpdates, views: Sequence[MomentsView]) -> Tensor:
    """One reading for weighted sums of every client, and sums of squares; float64 ``[M, 2, K]``, NaN where not valid.

    Args:
        clients: The round, with its vectors on the CPU.
        views: ``M`` ways to look at the clients.
    """
    device, everything = clients.tiles.device, [slice(0, clients.num_params)]
    bounds = [_bounds(everything if view.ranges is None else view.ranges) for view in views]
    ones = zeros(0, device)
    factors = [ones if view.factors is None else view.factors for view in views]
    squares = [view.squares for view in views]

    def read(span: Span, totals: Tensor) -> Tensor:
        own = [vector[span.first : span.first + span.num_params] for vector in factors]
        chosen = [clients.shard.within(parts, span) for parts in bounds]
        return ops.moments(span.updates, own, clients.valid, chosen, totals, span.num_params, squares)

    shape = len(views), 2, len(clients.clients)
    return clients.sum(zeros(math.prod(shape), device).view(shape), read)


def squared_length(shard: Shard, vector: Tensor, ranges: Sequence[slice]) -> Tensor:
    """The sum of squares over ranges of the model's parameters, of which the vector ``[P]`` has those that are here."""
    ones, bounds, here = zeros(0, vector.device), _bounds(ranges), torch.ones(1, dtype=torch.bool)

    def read(span: Span, total: Tensor) -> Tensor:
        chosen = [shard.within(bounds, span)]
        return ops.moments(span.updates, [ones], here, chosen, total, span.num_params, [True])

    whole = Span(0, len(vector), vector.detach()[None, None], None)
    return shard.sum([whole], zeros(2, vector.device).view(1, 2, 1), read)[0, 0, 0].cpu()


def _bounds(ranges: Sequence[slice]) -> Tensor:
    """Ranges of the model's parameters as the operators take them, int64 ``[R, 2]``."""
    return torch.tensor([[part.start, part.stop] for part in _merged(ranges)], dtype=torch.int64).view(-1, 2)


def _merged(ranges: Iterable[slice]) -> list[slice]:
    """The ranges in order; those that follow each other, such as weight and bias, are one."""
    merged: list[slice] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            part = slice(merged.pop().start, part.stop)
        merged.append(part)
    return merged


def measured(clients: ClientUpdates) -> ClientUpdates:
    """The round with its squared norms, which one reading gives, and all its vectors on the CPU."""
    return clients.with_norms(squared_norms(clients)).fetched()


def mean(global_params: Tensor, clients: ClientUpdates, weights: Tensor, *, rescale: bool, single: bool) -> Tensor:
    """One reading for the new global parameters."""
    own = _of_own_vectors(clients, global_params, None, weights, _NOTHING, False, rescale, single)
    if own is not None:
        return own[1]
    return _by_span(
        global_params,
        clients,
        lambda params, span: ops.rescaled_mean(
            params, span.updates, *_importances(clients, span, rescale), weights, single
        ),
    )


def scores_and_mean(
    global_params: Tensor,
    clients: ClientUpdates,
    alpha: Tensor,
    weights: Tensor,
    *,
    reweight: bool,
    rescale: bool,
    single: bool,
) -> tuple[Scores, Tensor]:
    """:func:`scores` and :func:`mean` in one reading, with the same bits."""
    totals = _no_totals(clients)
    own = _of_own_vectors(clients, global_params, alpha, weights, totals, reweight, rescale, single)
    if own is not None:
        return _scores(own[0]), own[1]
    params = _NewParams(global_params)

    def read(span: Span, totals: Tensor) -> Tensor:
        importances = _importances(clients, span, reweight or rescale)
        totals, new = ops.discrepancy_and_mean(
            params.old(span), span.updates, *importances, alpha, weights, totals, reweight, rescale, single
        )
        params.put(span, new)
        return totals

    return _scores(clients.sum(totals, read)), params.new


def norms_and_mean(
    global_params: Tensor, clients: ClientUpdates, weights: Tensor, *, single: bool
) -> tuple[Tensor, Tensor]:
    """Squared norms ``[K]``, NaN for clients of weight 0, and :func:`mean` without rescaling in one reading."""
    if clients.tiles.device.type != "cpu":  # where distances take no time beside the reading
        scores, params = scores_and_mean(
            global_params, clients, weights, weights, reweight=False, rescale=False, single=single
        )
        return scores.squared_norm, params
    nothing = zeros(len(clients.clients), clients.tiles.device)
    own = _of_own_vectors(clients, global_params, None, weights, nothing, False, False, single)
    if own is not None:
        return own
    new = _NewParams(global_params)

    def read(span: Span, totals: Tensor) -> Tensor:
        totals, params = ops.norms_and_mean(new.old(span), span.updates, weights, totals, single)
        new.put(span, params)
        return totals

    return clients.sum(nothing, read), new.new


def central_mean(global_params: Tensor, clients: ClientUpdates, read: Tensor, keep: int, *, nearest: bool) -> Tensor:
    """One reading for the mean of ``keep`` central values of every parameter."""
    return _by_span(
        global_params, clients, lambda params, span: ops.central_mean(params, span.updates, read, keep, nearest)
    )


def worth_sampling(clients: ClientUpdates) -> bool:
    """Whether a sample is less than half of the parameters."""
    return clients.num_params > 2 * _FEWEST_SAMPLED


def sampled_scores(clients: ClientUpdates, alpha: Tensor, *, reweight: bool) -> Scores:
    """Scores guessed from a few of the parameters, spread over all of them."""
    totals, size, single = _no_totals(clients), 0, may_fit_single(clients)
    for span in _sample(clients.tiles):
        importances = _importances(clients, span, reweight)
        totals = ops.discrepancy(span.updates, *importances, alpha, totals, span.num_params, single)
        size += span.num_params
    return _scores(clients.shard.sum_parts(totals * (clients.tiles.num_params / size)))


def _sample(tiles: ClientTiles) -> Iterator[Span]:
    """About one in 64 parameters, and at least 4096 if there are so many, in windows that are spread over all."""
    P, L, windows = tiles.num_params, min(tiles.tile, tiles.num_params), tiles.windows
    wanted, whole = max(_FEWEST_SAMPLED, P // 64), P // L
    if not isinstance(tiles, MatrixTiles):
        count = min(windows, -(-P // L))
        for i in range(count):
            first = i * (P // count) // L * L
            yield tiles.window(first, min(L, P - first, wanted // count))
    elif L * windows <= wanted:  # short tiles: every so many-th
        yield _windows(tiles, slice(0, whole, max(1, whole * L // wanted)), 1, L)
    else:
        chosen = range(0, whole, -(-whole // windows))
        each = windows // len(chosen)
        for tile in chosen:
            yield _windows(tiles, slice(tile, tile + 1), each, min(L // each, wanted // (len(chosen) * each)))


def _windows(tiles: MatrixTiles, chosen: slice, each: int, size: int) -> Span:
    """Views of equally distant windows of ``size`` parameters, so many in each of the chosen tiles."""
    apart = min(tiles.tile, tiles.num_params) // each

    def seen(matrix: Tensor) -> Tensor:
        in_tiles: Tensor = matrix[chosen, :, : each * apart].unflatten(2, (each, apart))
        return in_tiles[..., :size].transpose(1, 2).flatten(0, 1)

    updates = seen(tiles.updates)
    return Span(0, len(updates) * size, updates, None if tiles.fishers is None else seen(tiles.fishers))


def _by_span(global_params: Tensor, clients: ClientUpdates, read: Callable[[Tensor, Span], Tensor]) -> Tensor:
    """New parameters from those of every span."""
    params = _NewParams(global_params)
    for span in clients.tiles.spans():
        params.put(span, read(params.old(span), span))
    return params.new


class _NewParams:
    """New parameters that come span by span; not copied if they come at once."""

    def __init__(self, global_params: Tensor) -> None:
        self._old = global_params
        self._new: Tensor | None = None

    def old(self, span: Span) -> Tensor:
        return self._old[span.first : span.first + span.num_params]

    def put(self, span: Span, new: Tensor) -> None:
        if span.num_params == len(self._old):
            self._new = new
            return
        if self._new is None:
            self._new = empty(self._old.shape, self._old.dtype, self._old.device)
        self._new[span.first : span.first + span.num_params] = new

    @property
    def new(self) -> Tensor:
        assert self._new is not None, "a round has at least one parameter"
        return self._new


def _importances(clients: ClientUpdates, span: Span, wanted: bool) -> Importances:
    return (span.fishers, clients.fisher_min, clients.fisher_max) if wanted else (None, None, None)


def _of_own_vectors(
    clients: ClientUpdates,
    global_params: Tensor | None,
    alpha: Tensor | None,
    weights: Tensor | None,
    totals: Tensor,
    reweight: bool,
    rescale: bool,
    single: bool,
) -> tuple[Tensor, Tensor] | None:
    """One reading of the clients' vectors as they came; None where they are not all read there at once."""
    own = clients.tiles.vectors if clients.shard is WHOLE else None
    if own is None:
        return None
    importances = (own.fishers, clients.fisher_min, clients.fisher_max) if reweight or rescale else ([], None, None)
    return ops.aggregate_vectors(
        global_params, own.updates, own.base, *importances, alpha, weights, totals, reweight, rescale, single
    )


def _no_totals(clients: ClientUpdates) -> Tensor:
    return zeros(2 * len(clients.clients) + 1, clients.tiles.device)


def _scores(totals: Tensor) -> Scores:
    clients = totals.numel() // 2
    distance, squared_norm, mean_square = totals.split_with_sizes([clients, clients, 1])
    return Scores(distance, squared_norm, mean_square)
