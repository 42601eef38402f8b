"""Reading the rows of a store's file: in spans of bounded size, the next ones while the last one is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.memory import pages
from fdcr_fast.round.tiles import Span
from fdcr_fast.store.file import format as form
from fdcr_fast.store.rows import StoreShape
from fdcr_fast.store.store_tiles import StoreTiles, whole_stretches

BUFFERS = 3  # one in use, two being read: the disk is busy also while a thread waits for its turn
_SPAN_BYTES = 1 << 23  # long enough to read at full speed, short enough for the third-level cache


class Pieces:
    """A buffer of pieces, each one client's part of a tile, as numbers and as bytes."""

    def __init__(self, count: int, shape: StoreShape) -> None:
        memory = pages(max(count, 1) * shape.piece_bytes)  # reads past the page cache go to whole pages
        self.numbers = memory.view(shape.dtype).view(-1, shape.matrices, shape.tile)
        self.bytes = memory.numpy().reshape(-1, shape.piece_bytes)


class FileTiles(StoreTiles):
    """Rows of a file, as rules read them.

    The page cache is passed by where the file system allows: what is read once would only push out other things.

    Args:
        fd: Function that gives the open file.
        shape: Shape of all rows of the store.
        rows: Rows to read, in this order.
        epoch: Epoch of the file when they were chosen.
        max_resident: Bytes that three spans may take.
    """

    device = torch.device("cpu")

    def __init__(
        self, fd: Callable[[], int], shape: StoreShape, rows: Sequence[int], epoch: int, max_resident: int
    ) -> None:
        super().__init__(shape)
        self._fd = fd
        self._rows = rows
        self._epoch = epoch
        room = min(max_resident // BUFFERS, _SPAN_BYTES) // (max(len(rows), 1) * shape.piece_bytes)
        self._step = whole_stretches(shape, room)

    def spans(self) -> Iterator[Span]:
        """The whole round; a span lies in a buffer that a later one is read into."""
        starts = range(0, self._shape.tiles, self._step)
        buffers = [Pieces(self._step * len(self._rows), self._shape) for _ in starts[:BUFFERS]]
        ahead = len(buffers) - 1
        with self._uncached() as fd, ThreadPoolExecutor(max(ahead, 1)) as threads:

            def submit(i: int) -> Future[Span]:
                return threads.submit(self._next, fd, buffers[i % len(buffers)], starts[i])

            reading = deque(submit(i) for i in range(min(max(ahead, 1), len(starts))))
            for i in range(len(starts)):
                span = reading.popleft().result()
                if len(reading) < ahead and i + ahead < len(starts):
                    reading.append(submit(i + ahead))
                yield span

    def window(self, first: int, num_params: int) -> Span:
        """The parameters ``[first, first + num_params)`` alone, which must lie in one tile."""
        tile, column = divmod(first, self.tile)
        with self._uncached() as fd:
            numbers = self._read(fd, Pieces(len(self._rows), self._shape), tile, 1)
        return self._span(tile, numbers, slice(column, column + num_params))

    def _next(self, fd: int, buffer: Pieces, first: int) -> Span:
        return self._span(first, self._read(fd, buffer, first, min(self._step, self._shape.tiles - first)))

    def _read(self, fd: int, buffer: Pieces, first: int, tiles: int) -> Tensor:
        """Read tiles into the buffer, each stretch of neighbouring rows at once."""
        shape, K = self._shape, len(self._rows)
        if shape.capacity == K and list(_stretches(self._rows)) == [(0, K)]:
            read(fd, buffer.bytes[: tiles * K].reshape(-1), form.piece_offset(shape, first, 0))
        else:
            for t in range(tiles):
                for start, stop in _stretches(self._rows):
                    pieces = buffer.bytes[t * K + start : t * K + stop].reshape(-1)
                    read(fd, pieces, form.piece_offset(shape, first + t, self._rows[start]))
        check_epoch(self._fd(), self._epoch)
        return buffer.numbers[: tiles * K].view(tiles, K, shape.matrices, shape.tile)

    @contextmanager
    def _uncached(self) -> Iterator[int]:
        """The file once more, to read whole pages past the page cache, if the file system can."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        path = f"/proc/self/fd/{self._fd()}"
        whole_pages = self._shape.piece_bytes % form.PAGE == 0
        try:
            fd = os.open(path, flags | (os.O_DIRECT if whole_pages else 0))
        except OSError:
            fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)


def read(fd: int, to: Any, offset: int) -> None:
    """Fill a buffer from the file.

    Raises:
        DamagedStoreError: the file ends before.
    """
    view = memoryview(to)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise form.DamagedStoreError("the file ends early: it was truncated while open")
        view, offset = view[count:], offset + count


def check_epoch(fd: int, epoch: int) -> None:
    """Raise RuntimeError where rows of a file were taken back since: what was read may be a mixture."""
    if form.read_epoch(fd) != epoch:
        raise RuntimeError("clients were removed or replaced since the store was opened or read: open or read it again")


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions ``[start, stop)`` of rows that follow each other in the file."""
    start = 0
    for k in range(1, len(rows) + 1):
        if k == len(rows) or rows[k] != rows[k - 1] + 1:
            yield start, k
            start = k
