"""Rows in pinned memory of the host, more than a GPU may hold, which rules read there: copied while others are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.round.tiles import Span
from fdcr_fast.store.memory_rows import MemoryRows
from fdcr_fast.store.rows import Statistics, StoreShape, Vectors
from fdcr_fast.store.store_tiles import StoreTiles, whole_stretches

_SPAN_BYTES = 1 << 26  # of each of two buffers on the device: a millisecond of copying


class PinnedRows(MemoryRows):
    """Rows in pinned memory.

    Args:
        shape: Shape of all rows.
        device: Device on which rules read them.

    Raises:
        ValueError: memory cannot be pinned for this device, or what is left of it does not hold the rows.
    """

    def __init__(self, shape: StoreShape, device: torch.device) -> None:
        try:
            module = torch.get_device_module(device)
            if not module.is_available():
                raise RuntimeError(f"no {device.type} device is available here; compute_device may be left out")
            self._side = module.Stream(device=device)
            super().__init__(shape, torch.device("cpu"), pinned=True)
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise ValueError(f"a store cannot be pinned for {device}: {error}") from error
        self._reader = torch.empty(0, device=device).device  # with its number

    def fill(self, row: int, vectors: Vectors, base: Tensor | None = None) -> tuple[Statistics, int]:
        """:meth:`MemoryRows.fill`, when what was read before has been copied."""
        self._side.synchronize()
        return super().fill(row, vectors, base)

    def pack(self, rows: Sequence[int]) -> list[int]:
        """:meth:`MemoryRows.pack`, when what was read before has been copied."""
        self._side.synchronize()
        return super().pack(rows)

    def tiles(self, rows: Sequence[int]) -> PinnedTiles:
        """The packed rows, as rules read them."""
        return PinnedTiles(self.shape, self.data[:, : len(rows)], self._reader, self._side)


class PinnedTiles(StoreTiles):
    """Rows ``[T, K, matrices, L]`` in pinned memory, as rules read them on a device.

    A span is copied on a stream of its own while the one before it is used, into one of two buffers. The stream of
    whoever reads waits for the copy, and the copy for what was enqueued there before the last span; the host does not.
    """

    def __init__(self, shape: StoreShape, rows: Tensor, device: torch.device, side: Any) -> None:
        super().__init__(shape)
        self.device = device
        self._rows = rows
        self._side = side
        self._module = torch.get_device_module(device)
        self._step = whole_stretches(shape, _SPAN_BYTES // max(rows[:1].nbytes, 1))

    def spans(self) -> Iterator[Span]:
        """The whole round; a span lies in a buffer that a later one is copied to."""
        starts = range(0, self._shape.tiles, self._step)
        buffers = [self._buffer(self._step) for _ in starts[:2]]
        copied = self._copy(0, buffers[0])
        for i, first in enumerate(starts):
            self._module.current_stream(self.device).wait_stream(self._side)
            numbers = copied
            if i + 1 < len(starts):
                copied = self._copy(starts[i + 1], buffers[(i + 1) % 2])
            yield self._span(first, numbers)

    def window(self, first: int, num_params: int) -> Span:
        """The parameters ``[first, first + num_params)`` alone, which must lie in one tile."""
        tile, column = divmod(first, self.tile)
        numbers = self._copy(tile, self._buffer(1))
        self._module.current_stream(self.device).wait_stream(self._side)
        return self._span(tile, numbers, slice(column, column + num_params))

    def _buffer(self, tiles: int) -> Tensor:
        return torch.empty((tiles, *self._rows.shape[1:]), dtype=self._rows.dtype, device=self.device)

    def _copy(self, first: int, buffer: Tensor) -> Tensor:
        """Start to copy tiles to the buffer, each at once, when the device has done what it was given so far."""
        self._side.wait_stream(self._module.current_stream(self.device))
        rows = self._rows[first : first + len(buffer)]
        with self._module.stream(self._side):
            for to, tile in zip(buffer, rows, strict=False):  # the last tiles may be fewer
                to.copy_(tile, non_blocking=True)
        buffer.record_stream(self._side)  # not given to others before, should the reader not come to its end
        return buffer[: len(rows)]
