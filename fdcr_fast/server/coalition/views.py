"""How clients resemble each other: in their updates, in their importances, and in what their updates concentrate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout
from fdcr_fast.server.coalition.search import Views
from fdcr_fast.server.gram import GramView, grams
from fdcr_fast.server.intake import ClientUpdates, Span

_BLOCK = 1 << 20  # numbers of all clients that are looked at together


@dataclass(frozen=True)
class ParamGroups:
    """Which parameters decide between classes, and which find features.

    Attributes:
        head: Ranges of the last linear layer.
        features: Ranges of everything before the last two linear layers.
    """

    head: tuple[slice, ...]
    features: tuple[slice, ...]

    @classmethod
    def whole(cls, num_params: int) -> ParamGroups:
        """All parameters in both groups, for a model of which nothing is known."""
        return cls((slice(0, num_params),), (slice(0, num_params),))

    @classmethod
    def from_layout(cls, layout: ParamLayout) -> ParamGroups:
        """Linear layers told by their shape: modules with a matrix named ``weight``."""
        linear = [
            name.rpartition(".")[0]
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            if name.rpartition(".")[2] == "weight" and len(shape) == 2
        ]
        return cls._of_modules(layout, linear)

    @classmethod
    def from_module(cls, model: nn.Module) -> ParamGroups:
        """Linear layers in the order of ``model.named_modules()``."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return cls._of_modules(ParamLayout.from_module(model), linear)

    @classmethod
    def _of_modules(cls, layout: ParamLayout, linear: list[str]) -> ParamGroups:
        """Where a model has fewer layers than that, the features are all but the head, and else everything."""

        def ranges(modules: list[str], inside: bool) -> tuple[slice, ...]:
            return tuple(layout.slices[name] for name in layout.names if (name.rpartition(".")[0] in modules) == inside)

        if not linear:
            return cls.whole(layout.numel)
        head = ranges(linear[-1:], True)
        return cls(head, ranges(linear[-2:], False) or ranges(linear[-1:], False) or head)


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
    centred = torch.where(finite, values - known.mean(), 0.0)
    deviation = known.std(correction=0)
    return centred / deviation if deviation > 0 else torch.zeros_like(values)


def round_views(clients: ClientUpdates, groups: ParamGroups, regularisation: float) -> Views:
    """The views of one round of valid clients only; see :class:`fdcr_fast.CoalitionFDCR` for the formulas."""
    update, importance = grams(
        clients, views=[GramView("fisher_update"), GramView("fourth_root_fisher", groups.features)]
    )
    valid = clients.valid
    mean_fisher = _mean_fisher(clients)
    head, kurtosis = (
        _head_importance(clients, groups, mean_fisher),
        _kurtosis(clients, groups, mean_fisher, regularisation),
    )
    return Views(
        standardised(_cosines(update[valid][:, valid])),
        standardised(_cosines(importance[valid][:, valid])),
        standard_scores(head) + standard_scores(kurtosis),
    )


def _cosines(gram: Tensor) -> Tensor:
    length = gram.diagonal().sqrt()
    return gram / (length[:, None] * length)


def _mean_fisher(clients: ClientUpdates) -> Tensor:
    """``Pbar``, the mean of the valid clients' Fishers, each divided by its sum; float64, of the parameters here."""
    everything = [slice(0, clients.num_params)]
    total = _sums(clients, everything, lambda columns, updates, fishers: fishers.sum(1))
    share = 1 / (len(total) * total)
    mean = torch.empty(clients.tiles.num_params, dtype=torch.float64, device=total.device)
    for span in clients.spans():
        for columns, _, fishers in _blocks(clients, span, everything):
            mean[columns] = share @ fishers
    return mean


def _head_importance(clients: ClientUpdates, groups: ParamGroups, mean_fisher: Tensor) -> Tensor:
    """``r_k``: how important the parameters of the head are that a client changes."""

    def terms(columns: slice, updates: Tensor, _fishers: Tensor) -> Tensor:
        squares = updates.square_()
        return torch.stack([squares @ mean_fisher[columns], squares.sum(1)])

    weighted, plain = _sums(clients, groups.head, terms, 2)
    return torch.log(weighted / plain).cpu()


def _kurtosis(clients: ClientUpdates, groups: ParamGroups, mean_fisher: Tensor, regularisation: float) -> Tensor:
    """``kappa_k``: how much a client's update concentrates on unimportant features."""
    floor = regularisation * clients.shard.sum_vector(mean_fisher, torch.sum) / clients.num_params
    size = sum(group.stop - group.start for group in groups.features)

    def terms(columns: slice, updates: Tensor, _fishers: Tensor) -> Tensor:
        q = updates.square_() / (mean_fisher[columns] + floor)
        return torch.stack([q.sum(1), q.square_().sum(1)])

    first, second = _sums(clients, groups.features, terms, 2)
    return torch.log((second / size) / (first / size) ** 2).cpu()


def _sums(
    clients: ClientUpdates, ranges: Iterable[slice], terms: Callable[[slice, Tensor, Tensor], Tensor], *size: int
) -> Tensor:
    """Sums over ranges of the parameters of what ``terms`` says of each valid client, float64 ``[*size, K']``."""

    def read(span: Span, total: Tensor) -> Tensor:
        for block in _blocks(clients, span, ranges):
            total = total + terms(*block)
        return total

    zeros = torch.zeros(*size, int(clients.valid.sum()), dtype=torch.float64, device=clients.tiles.device)
    return clients.sum(zeros, read)


def _blocks(clients: ClientUpdates, span: Span, ranges: Iterable[slice]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Columns of the valid clients of a span within the ranges: where they are among the parameters that are here,
    updates and Fishers ``[K', n]`` in float64.
    """
    valid = clients.valid.to(clients.tiles.device)
    width = max(1, _BLOCK // max(1, len(valid)))
    tile, shift = span.updates.shape[2], clients.shard.first
    for start in range(span.first, span.first + span.num_params, tile):
        stop = min(start + tile, span.first + span.num_params)
        for part in ranges:
            for first in range(max(start, part.start - shift), min(stop, part.stop - shift), width):
                last = min(first + width, stop, part.stop - shift)
                block = (start - span.first) // tile, valid, slice(first - start, last - start)
                assert span.fishers is not None
                yield slice(first, last), span.updates[block].double(), span.fishers[block].double()
