"""Tiles of a round that are read in another way than they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fdcr_fast.round.tiles import ClientTiles, ClientVectors, Span


@dataclass(frozen=True)
class TilesView:
    """:class:`ClientTiles` that are those of ``tiles``, with every span changed by :meth:`seen`."""

    tiles: ClientTiles

    @property
    def num_params(self) -> int:
        """``P``, as of the tiles."""
        return self.tiles.num_params

    @property
    def tile(self) -> int:
        """``L``, as of the tiles."""
        return self.tiles.tile

    @property
    def device(self) -> torch.device:
        """The device of the spans, as of the tiles."""
        return self.tiles.device

    @property
    def with_fishers(self) -> bool:
        """Whether the spans have Fishers; by default as those of the tiles do."""
        return self.tiles.with_fishers

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of updates and Fishers, as of the tiles."""
        return self.tiles.dtypes

    @property
    def windows(self) -> int:
        """The number of places that may be read, as of the tiles."""
        return self.tiles.windows

    @property
    def vectors(self) -> ClientVectors | None:
        """None: the rows are seen changed."""
        return None

    def spans(self) -> Iterator[Span]:
        """The spans of the tiles, changed."""
        return map(self.seen, self.tiles.spans())

    def window(self, first: int, num_params: int) -> Span:
        """A window of the tiles, changed."""
        return self.seen(self.tiles.window(first, num_params))

    def seen(self, span: Span) -> Span:
        """A span as this view shows it."""
        raise NotImplementedError
