"""How clients resemble each other: in the direction of their updates, and in what these concentrate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.readings import MomentsView
from fdcr_fast.round.tiles import Span
from fdcr_fast.round.tiles_view import TilesView
from fdcr_fast.round.vectors import sent
from fdcr_fast.rules.coalition.search import Views
from fdcr_fast.rules.pairwise.gram import GramView, grams
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.valid_clients import of_all

_NO_DIRECTION = 1e-6  # squared length beside which a cosine is rounding
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-30, 1e30  # of a Fisher, in float32


def standardised(matrix: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over what lies off the diagonal, 0 on it; what is not finite counts as mean."""
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    result = torch.zeros_like(matrix)
    result[off] = standard_scores(matrix[off])
    return result


def standard_scores(values: Tensor) -> Tensor:
    """``(x - mean) / sd`` with the population's deviation; 0 where all are equal or a value is not finite."""
    finite = values.isfinite()
    known = values[finite]
    if len(known) < 2:
        return torch.zeros_like(values)
    deviation, mean = torch.std_mean(known, correction=0)
    return torch.where(finite, values - mean, 0.0) / deviation if deviation > 0 else torch.zeros_like(values)


@dataclass(frozen=True)
class Features:
    """What the valid clients' updates of the features tell by themselves and beside the model, float64 ``[n]``.

    Attributes:
        length: ``||D_k||`` over the features.
        along: ``<D_k, w>`` over the features.
        kurtosis: ``log(mean(D_k^4) / mean(D_k^2)^2)``: how few of them change most, such as those that see a trigger.
        whole: The same of all parameters, the head included, where one class may change most.
    """

    length: Tensor
    along: Tensor
    kurtosis: Tensor
    whole: Tensor

    @property
    def concentration(self) -> Tensor:
        """``c`` of a cautious start."""
        return standard_scores(self.kurtosis) + standard_scores(self.whole) / 2

    @property
    def excess(self) -> Tensor:
        """The kurtosis of the features above that of the median client; 0 of an update that has none, such as zeros."""
        known = self.kurtosis.isfinite()
        if not known.any():
            return torch.zeros_like(self.kurtosis)
        return torch.where(known, self.kurtosis - self.kurtosis[known].median(), 0.0)


def features_of(global_params: Tensor, clients: ClientUpdates, groups: ParamGroups) -> Features:
    """One reading of a round: of the features, and of all else."""
    P = clients.num_params
    views = [
        MomentsView(ranges=groups.features, squares=True),
        MomentsView(ranges=_others(groups.features, P), squares=True),
        MomentsView(global_params, groups.features),
    ]
    inside, outside, (along, _) = readings.moments(clients, views).cpu()
    squares, kurtosis = _kurtosis(clients, inside, _size(groups.features))
    _, whole = _kurtosis(clients, inside + outside, P)
    return Features(squares.sqrt(), clients.of_valid(along), kurtosis, whole)


def _others(ranges: Sequence[slice], num_params: int) -> list[slice]:
    """All parameters that are not in the ranges."""
    parts = sorted(ranges, key=lambda part: part.start)
    bounds = zip([0, *(part.stop for part in parts)], [*(part.start for part in parts), num_params], strict=True)
    return [slice(stop, start) for stop, start in bounds if stop < start]


def round_views(clients: ClientUpdates, groups: ParamGroups, regularisation: float) -> Views:
    """The views of one round of valid clients only; see :class:`fdcr_fast.CoalitionFDCR` for the formulas."""
    fisher = _relative_fisher(clients, torch.float64)
    views = [
        MomentsView((fisher + regularisation).reciprocal_(), groups.features, squares=True),
        MomentsView(fisher, groups.head, squares=True),
        MomentsView(None, groups.head, squares=True),
    ]
    features, (weighted, _), (plain, _) = readings.moments(clients, views).cpu()
    _, kurtosis = _kurtosis(clients, features, _size(groups.features))
    head = clients.of_valid(torch.log(weighted / plain))  # how important the parameters are that a client changes
    concentration = standard_scores(head) + standard_scores(kurtosis)
    return Views(standardised(_similarity(clients, fisher)), concentration)


def cautious_views(clients: ClientUpdates, groups: ParamGroups, features: Features) -> Views:
    """The views of a cautious start: similarity is that of the features alone."""
    fisher, first = _relative_fisher(clients, getattr(torch, _precision(clients))), clients.shard.first
    for part in _others(groups.features, clients.num_params):
        fisher[max(part.start - first, 0) : max(part.stop - first, 0)] = 0
    return Views(standardised(_similarity(clients, fisher)), features.concentration)


@dataclass(frozen=True)
class _SharedFisher(TilesView):
    """The tiles of a round in which all clients have one Fisher, in whole tiles; of rows it takes no memory."""

    fisher: Tensor

    with_fishers = True

    def seen(self, span: Span) -> Span:
        tiles, clients, length = span.updates.shape
        own = self.fisher[span.first : span.first + tiles * length]
        return replace(span, fishers=own.view(tiles, 1, length).expand(tiles, clients, length))


def _precision(clients: ClientUpdates) -> str:
    """In what products of the clients' rows are formed."""
    return "float32" if readings.may_fit_single(clients) else "float64"


def _similarity(clients: ClientUpdates, fisher: Tensor) -> Tensor:
    """``A [K', K']`` before standardising, from ``Pbar`` at any scale, which is overwritten."""
    precision = _precision(clients)
    # sqrt(F) D with F = sqrt(Pbar), whose scale does not matter, is Pbar^(1/4) D.
    metric = fisher.sqrt_().to(getattr(torch, precision))
    shared = replace(clients, tiles=_SharedFisher(clients.tiles, metric))
    (inner,) = grams(shared, views=[GramView("fisher_update")], precision=precision)
    valid = clients.valid
    cosines = _cosines(inner.cpu()[valid][:, valid]).nan_to_num(0.0)
    rows = cosines.mean(0)
    # The means are added first, so that the matrix is symmetric to the bit: of a state one triangle is stored.
    return _cosines(cosines - (rows + rows[:, None]) + rows.mean(), _NO_DIRECTION)


def _cosines(gram: Tensor, least: float = 0.0) -> Tensor:
    """Cosines from inner products; NaN for those whose squared length is not above the least."""
    square = gram.diagonal()
    length = torch.where(square > least, square, torch.nan).sqrt()
    return gram / (length[:, None] * length)


@dataclass(frozen=True)
class _FishersAlone(TilesView):
    """The tiles of a round with the Fishers in the place of the updates."""

    with_fishers = False

    def seen(self, span: Span) -> Span:
        assert span.fishers is not None, "a rule that takes importances is given Fishers"
        return replace(span, updates=span.fishers, fishers=None)


@dataclass(frozen=True)
class _WholeTiles(_FishersAlone):
    """The Fishers with what fills up the last tile, as if these were parameters."""

    @property
    def num_params(self) -> int:
        """That of all tiles."""
        return -(-self.tiles.num_params // self.tile) * self.tile

    def seen(self, span: Span) -> Span:
        fishers = super().seen(span)
        tiles, _, length = fishers.updates.shape
        return replace(fishers, num_params=tiles * length)


def _relative_fisher(clients: ClientUpdates, dtype: torch.dtype) -> Tensor:
    """``Pbar``, the mean of the valid clients' Fishers, each divided by its sum, over its mean; the parameters here.

    More numbers, which mean nothing, fill up the last tile.
    """
    fishers = replace(clients, tiles=_FishersAlone(clients.tiles))
    total = clients.of_valid(readings.moments(fishers, [MomentsView()])[0, 0].cpu())
    weights = clients.num_params / (len(total) * total)
    # As products of float32 are far from its limits: the scale of a Fisher is a client's to choose.
    usual = bool(((weights > _LEAST_WEIGHT) & (weights < _MOST_WEIGHT)).all())
    whole, device = _WholeTiles(clients.tiles), clients.tiles.device
    nothing = torch.zeros(1, dtype=dtype, device=device).expand(whole.num_params)
    on = sent(of_all(clients, weights), device)
    single = usual and readings.fits_single(clients)
    return readings.mean(nothing, replace(clients, tiles=whole).on_device(), on, rescale=False, single=single)


def _kurtosis(clients: ClientUpdates, moments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sum of ``q``, and the logarithm of ``mean(q^2) / mean(q)^2``, from sums ``[2, K]`` over so many."""
    first, second = moments
    return clients.of_valid(first), clients.of_valid(torch.log((second / size) / (first / size) ** 2))


def _size(ranges: Sequence[slice]) -> int:
    return sum(part.stop - part.start for part in ranges)
