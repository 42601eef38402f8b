"""Tiles of a round that are read in another way than they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fdcr_fast.round.tiles import ClientTiles, Span


@dataclass(frozen=True)
class TilesView:
    """:class:`ClientTiles` that are those of ``tiles``, with every span changed by :meth:`seen`."""

    tiles: ClientTiles

    @property
    def num_params(self) -> int:
        """See :class:`ClientTiles`."""
        return self.tiles.num_params

    @property
    def tile(self) -> int:
        """See :class:`ClientTiles`."""
        return self.tiles.tile

    @property
    def device(self) -> torch.device:
        """See :class:`ClientTiles`."""
        return self.tiles.device

    @property
    def with_fishers(self) -> bool:
        """See :class:`ClientTiles`."""
        return self.tiles.with_fishers

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """See :class:`ClientTiles`."""
        return self.tiles.dtypes

    @property
    def windows(self) -> int:
        """See :class:`ClientTiles`."""
        return self.tiles.windows

    def spans(self) -> Iterator[Span]:
        """See :meth:`ClientTiles.spans`."""
        return map(self.seen, self.tiles.spans())

    def window(self, first: int, num_params: int) -> Span:
        """See :meth:`ClientTiles.window`."""
        return self.seen(self.tiles.window(first, num_params))

    def seen(self, span: Span) -> Span:
        """A span as this view shows it."""
        raise NotImplementedError
