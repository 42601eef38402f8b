"""What ranks tell each other of the parts of a round that they hold, and the round that they make up together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.round.blocks import cut, in_order
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shard import Shard
from fdcr_fast.round.tiles import Span
from fdcr_fast.round.tiles_view import TilesView

_COPIED_ELEMENTS = 1 << 23  # of rows that are put in order at once


@dataclass(frozen=True)
class RoundPart:
    """What a rank tells the others of its part of the round.

    Attributes:
        error: Reason why it cannot take part; None where it can.
        settings: Settings that must be the same everywhere.
        num_samples: Sample counts by id of the clients in its rows, in order.
        statistics: Their squared norms, and smallest and largest Fisher entries if there are any; float64 ``[1, K]``
            or ``[3, K]``.
        rejected: Reason by client id.
    """

    error: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    num_samples: dict[Hashable, float] = field(default_factory=dict)
    statistics: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    rejected: dict[Hashable, str] = field(default_factory=dict)

    @classmethod
    def of(cls, clients: ClientUpdates, settings: Mapping[str, str]) -> RoundPart:
        """The part of a rank that can take part."""
        ranges = [x.cpu() for x in (clients.fisher_min, clients.fisher_max) if x is not None]
        num_samples = dict(zip(clients.clients, clients.num_samples.tolist(), strict=True))
        statistics = torch.stack([clients.squared_norm, *ranges])
        return cls(None, settings, num_samples, statistics, clients.rejected)


def joined(clients: ClientUpdates, parts: Sequence[RoundPart], shard: Shard, num_params: int) -> ClientUpdates:
    """A rank's part as a part of the whole of so many parameters.

    It has the clients that all ranks have, in the order of the first rank.
    """
    rejected: dict[Hashable, str] = {}
    for part in parts:
        rejected = {**part.rejected, **rejected}
    together = []
    for client in dict.fromkeys(client for part in parts for client in part.num_samples):
        counts = [part.num_samples.get(client) for part in parts]
        if None in counts:
            rejected.setdefault(client, f"its part for rank {counts.index(None)} did not arrive")
        elif counts.count(counts[0]) < len(counts):
            rejected[client] = "it told the ranks different sample counts"
        else:
            together.append(client)
    statistics = [part.statistics[:, _positions(part.num_samples, together)] for part in parts]
    rows = _positions(dict.fromkeys(clients.clients), together)
    low, high = None, None
    if len(statistics[0]) > 1:
        low, high = (torch.stack([s[i] for s in statistics]) for i in (1, 2))
        low, high = low.amin(0), high.amax(0)
    return ClientUpdates(
        tiles=clients.tiles if rows.tolist() == list(range(len(clients.clients))) else ChosenRows(clients.tiles, rows),
        num_samples=clients.num_samples[rows],
        clients=tuple(together),
        squared_norm=in_order([s[0] for s in statistics]),
        fisher_min=low,
        fisher_max=high,
        valid=torch.ones(len(together), dtype=torch.bool),
        rejected=rejected,
        num_params=num_params,
        shard=shard,
        unread=clients.unread,
    )


def _positions(clients: Iterable[Hashable], wanted: Sequence[Hashable]) -> Tensor:
    row = {client: i for i, client in enumerate(clients)}
    return torch.tensor([row[client] for client in wanted], dtype=torch.int64)


@dataclass(frozen=True)
class ChosenRows(TilesView):
    """Some of the rows of a round in another order, copied as they are read: where ranks accept in different orders."""

    rows: Tensor

    def spans(self) -> Iterator[Span]:
        """The spans in pieces of whole stretches, so that no copy grows with the model."""
        unit = max(1, ops.STRETCH // self.tile)
        tiles = max(1, _COPIED_ELEMENTS // (self.tile * unit * max(1, len(self.rows)))) * unit
        for span in self.tiles.spans():
            stops = range(span.first, span.first + span.num_params, tiles * self.tile)
            for part in cut(span, stops):
                yield self.seen(part)

    def seen(self, span: Span) -> Span:
        """The chosen rows of a span, copied."""
        rows = self.rows.to(self.device)
        fishers = None if span.fishers is None else span.fishers[:, rows]
        return replace(span, updates=span.updates[:, rows], fishers=fishers)
