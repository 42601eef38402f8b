"""Tiles that a store gives out, read in spans of whole stretches."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.round.tiles import ClientVectors, Span
from fdcr_fast.store.rows import FISHER, UPDATE, StoreShape


class StoreTiles:
    """Tiles of a store, as far as they are known by the shape of its rows.

    Args:
        shape: Shape of all rows of the store.
    """

    windows = 2  # whole tiles are read

    def __init__(self, shape: StoreShape) -> None:
        self._shape = shape

    @property
    def num_params(self) -> int:
        """``P``."""
        return self._shape.num_params

    @property
    def tile(self) -> int:
        """``L``, the number of parameters in a tile."""
        return self._shape.tile

    @property
    def with_fishers(self) -> bool:
        """Whether the spans have Fishers."""
        return self._shape.with_fishers

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of updates and Fishers."""
        return frozenset({self._shape.dtype})

    @property
    def vectors(self) -> ClientVectors | None:
        """None: the rows are copies."""
        return None

    def _span(self, first: int, numbers: Tensor, columns: slice = slice(None)) -> Span:
        """Tiles ``[T', K, matrices, L]`` from the given one on, or columns of one tile."""
        begin, stop, _ = columns.indices(len(numbers) * self.tile)
        param = first * self.tile + begin
        return Span(
            param,
            min(stop - begin, self.num_params - param),
            numbers[:, :, UPDATE, columns],
            numbers[:, :, FISHER, columns] if self.with_fishers else None,
        )


def whole_stretches(shape: StoreShape, tiles: int) -> int:
    """At most so many tiles, at least one stretch, that hold whole stretches of parameters.

    Spans of whole stretches have the bits of one reading of everything.
    """
    fewest = max(1, ops.STRETCH // shape.tile)
    return min(max(tiles // fewest, 1) * fewest, shape.tiles)
