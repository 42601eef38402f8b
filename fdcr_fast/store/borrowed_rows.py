"""Rows that stay in the tensors in which they came, from where rules read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.memory import empty
from fdcr_fast.ops.vectors import SplitVector
from fdcr_fast.round.tiles import ClientVectors, Span
from fdcr_fast.store.rows import FISHER, UPDATE, Accepted, Statistics, StoreShape, Vectors
from fdcr_fast.store.store_tiles import StoreTiles, whole_stretches

_SPAN_BYTES = 1 << 23  # of the buffer: many parameters at once, and still in cache when they are read


@dataclass(frozen=True)
class BorrowedRow:
    """What a client sent, by UPDATE and FISHER, and what is to be taken from the update."""

    vectors: Mapping[int, SplitVector]
    base: Tensor | None


class BorrowedRows:
    """Rows that are looked at when they are aggregated, and not when they come.

    Args:
        shape: Shape of the rows as rules read them.
        device: Device of the clients' tensors.
    """

    unread = True

    def __init__(self, shape: StoreShape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self._rows: dict[int, BorrowedRow] = {}

    def fill(self, row: int, vectors: Vectors, base: Tensor | None = None) -> tuple[Statistics, int]:
        """Keep a client's vectors as a row that is nobody's yet; no statistics, and no checksum."""
        self._rows[row] = BorrowedRow({matrix: SplitVector(pieces) for matrix, pieces in vectors.items()}, base)
        return {}, 0

    def ranges(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """One reading of the Fishers. Rounding changes no order: it is enough to round what is found."""
        if not (rows and self.shape.with_fishers):
            return None
        pieces = [piece for row in rows for piece in self._rows[row].vectors[FISHER].pieces]
        low, high = torch.stack(ops.vector_range(pieces, len(rows))).cpu().to(self.shape.dtype).double()
        return low, high

    def commit(self, accepted: Accepted) -> None:
        """The clients hold what they sent: there is nothing to write down."""

    def forget(self, rows: Sequence[int]) -> None:
        """Let go of the tensors."""
        for row in rows:
            self._rows.pop(row, None)

    def mark_round(self, ended: bool) -> None:
        """Nobody opens these rows again: there is nothing to note."""

    def pack(self, rows: Sequence[int]) -> list[int]:
        """Rows can lie anywhere."""
        return list(rows)

    def read(self, row: int) -> Tensor:
        """One client's row ``[matrices, P]``, a copy."""
        tiles, copied = self.tiles([row]), []
        for span in tiles.spans():
            matrices = [span.updates] if span.fishers is None else [span.fishers, span.updates]
            copied.append(torch.stack([x.flatten()[: span.num_params] for x in matrices]))
        return torch.cat(copied, dim=1)

    def tiles(self, rows: Sequence[int]) -> BorrowedTiles:
        """The given rows, as rules read them.

        Raises:
            ValueError: a tensor has another size than when it was put, or no memory any more.
        """
        borrowed = [self._rows[row] for row in rows]
        for row, each in zip(rows, borrowed, strict=True):
            sizes = {sum(map(Tensor.numel, vector.pieces)) for vector in each.vectors.values()}
            if sizes != {self.shape.num_params}:
                raise ValueError(
                    f"the tensors of row {row} have {sorted(sizes)} numbers, expected {self.shape.num_params}: they "
                    "must not change between put and aggregate"
                )
            if any(x.numel() and not x.data_ptr() for vector in each.vectors.values() for x in vector.pieces):
                raise ValueError(f"the memory of tensors of row {row} was freed between put and aggregate")
        return BorrowedTiles(self.shape, borrowed, self.device)

    def close(self) -> None:
        """Nothing is open."""


def _place(base: Tensor | None) -> Hashable:
    """What is the same for the same numbers in memory."""
    return None if base is None else (base.data_ptr(), base.stride(), base.dtype)


class BorrowedTiles(StoreTiles):
    """Rows as rules read them: where they lie, or in spans that are filled from there when they are asked for."""

    windows = 4  # each takes a slice of every client's tensors

    def __init__(self, shape: StoreShape, rows: Sequence[BorrowedRow], device: torch.device) -> None:
        super().__init__(shape)
        self.device = device
        self._rows = rows
        same_base = [list(run) for _, run in itertools.groupby(range(len(rows)), lambda k: _place(rows[k].base))]
        self._runs = [(slice(run[0], run[-1] + 1), rows[run[0]].base) for run in same_base]
        self._step = whole_stretches(shape, _SPAN_BYTES // (max(len(rows), 1) * shape.piece_bytes))
        self._buffer = empty((self._step, len(rows), shape.matrices, shape.tile), shape.dtype, device)

    @property
    def vectors(self) -> ClientVectors | None:
        """What the clients sent, if all of it is read as float32 on the CPU and from all of it the same is taken."""
        if self._shape.dtype != torch.float32 or self.device.type != "cpu" or len(self._runs) != 1:
            return None
        base = self._runs[0][1]
        if base is not None and base.dtype != torch.float32:
            return None
        fishers = self._whole(FISHER) if self.with_fishers else []
        return ClientVectors(self._whole(UPDATE), base, fishers)

    def _whole(self, matrix: int) -> list[Tensor]:
        return [piece for row in self._rows for piece in row.vectors[matrix].pieces]

    def spans(self) -> Iterator[Span]:
        """The whole round; a span lies in the buffer that the next one is read into."""
        for first in range(0, self._shape.tiles, self._step):
            tiles = min(self._step, self._shape.tiles - first)
            yield self._filled(first * self.tile, self._buffer[:tiles])

    def window(self, first: int, num_params: int) -> Span:
        """The parameters ``[first, first + num_params)`` alone."""
        size = len(self._rows), self._shape.matrices, num_params
        return self._filled(first, self._buffer.view(-1)[: math.prod(size)].view(1, *size))

    def _filled(self, first: int, numbers: Tensor) -> Span:
        stop = min(first + numbers.shape[0] * numbers.shape[3], self.num_params)
        updates, fishers = numbers[:, :, UPDATE], numbers[:, :, FISHER] if self.with_fishers else None
        for rows, base in self._runs:
            less = None if base is None else base[first:stop]
            ops.fill_rows(self._pieces(UPDATE, rows, first, stop), updates[:, rows], less)
        if fishers is not None:
            ops.fill_rows(self._pieces(FISHER, slice(None), first, stop), fishers)
        return Span(first, stop - first, updates, fishers)

    def _pieces(self, matrix: int, rows: slice, start: int, stop: int) -> list[Tensor]:
        return [piece for row in self._rows[rows] for piece in row.vectors[matrix].between(start, stop)]
