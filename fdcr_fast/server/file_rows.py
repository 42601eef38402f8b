"""Rows in a file: written so that a crash leaves whole contributions only, read ahead in spans of bounded size."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
import zlib
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.server import file_format as form
from fdcr_fast.server.file_format import PAGE, DamagedStoreError
from fdcr_fast.server.intake import ClientTiles, Span
from fdcr_fast.server.rows import (
    FISHER,
    NO_STATISTICS,
    UPDATE,
    Accepted,
    Statistics,
    StoreShape,
    Vectors,
)

DEFAULT_RESIDENT = 1 << 28
_CHUNK_BYTES = 1 << 22  # of one client that are converted before they are written
_SPAN_BYTES = 1 << 23  # of all clients: long enough to read at full speed, short enough for the third-level cache
_ATTEMPTS = 20  # to read a record that another process may be writing
_PIECE_BYTES = 1 << 16  # of one vector in one tile: long enough to write and read at full speed


class FileRows:
    """Rows in an open file.

    A contribution is written in three steps: its data, a flush, and its record with a checksum, which alone makes the
    row count; then another flush. Taking one back empties the record before the row is used again.
    """

    device = torch.device("cpu")

    def __init__(self, fd: int, shape: StoreShape, max_resident: int, sync: bool, writable: bool) -> None:
        self.fd = fd
        self.shape = shape
        self._max_resident = max_resident
        self._sync = sync
        self._writable = writable
        self._offset = form.data_offset(shape)
        self._tile_bytes = shape.capacity * shape.piece_bytes
        self._lock = threading.Lock()
        self._sequence = 0
        self._epoch = self.epoch()
        if max_resident < 2 * self._tile_bytes:
            raise ValueError(
                f"max_resident must hold two tiles of all clients, {2 * self._tile_bytes} bytes, got {max_resident}"
            )

    @staticmethod
    def tile(num_params: int, capacity: int, dtype: torch.dtype, with_fishers: bool, max_resident: int) -> int:
        """Tiles of whole pages, of at most 64 KiB per vector and client, and such that ``max_resident`` holds four."""
        matrices = 2 if with_fishers else 1
        room = max_resident // (4 * max(capacity, 1) * matrices)
        wanted = min(room, _PIECE_BYTES, max(num_params, 1) * dtype.itemsize)
        return max(-(-min(wanted, room) // PAGE), 1) * PAGE // dtype.itemsize

    @classmethod
    def create(cls, path: str | os.PathLike[str], shape: StoreShape, max_resident: int, sync: bool) -> FileRows:
        """A new file, its header written when all its room is reserved."""
        if shape.dtype not in form.DTYPES:
            raise TypeError(f"a file holds float32, float64, bfloat16 or float16, got {shape.dtype}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, form.data_offset(shape) + shape.nbytes)
            rows = cls(fd, shape, max_resident, sync, writable=True)
            rows._flush()
            _write(fd, form.pack_header(shape), 0)
            rows._flush()
            if sync:
                _flush_folder(path)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return rows

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], writable: bool, max_resident: int, sync: bool, verify: bool
    ) -> tuple[FileRows, dict[Hashable, Accepted]]:
        """An existing file and its clients."""
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if writable:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shape = form.unpack_header(os.pread(fd, PAGE, 0))
            expected = form.data_offset(shape) + shape.nbytes
            if os.fstat(fd).st_size != expected:
                raise DamagedStoreError(f"the file has {os.fstat(fd).st_size} bytes, expected {expected}")
            rows = cls(fd, shape, max_resident, sync, writable)
            accepted = rows._load()
            if verify:
                for client in accepted.values():
                    rows._verify(client)
        except DamagedStoreError as error:
            os.close(fd)
            raise DamagedStoreError(f"{os.fspath(path)!r} cannot be opened: {error}") from None
        except BlockingIOError:
            os.close(fd)
            raise BlockingIOError(f"another process has {os.fspath(path)!r} open for writing") from None
        except BaseException:
            os.close(fd)
            raise
        return rows, accepted

    def fill(self, row: int, vectors: Vectors) -> tuple[Statistics, int]:
        """Write a client's vectors into a row that is nobody's yet; their statistics, and the checksum of the row."""
        shape = self.shape
        chunk = max(1, min(shape.tiles, min(_CHUNK_BYTES, self._max_resident) // shape.piece_bytes))
        buffer = _Pieces(chunk, shape)
        statistics = dict.fromkeys(vectors, NO_STATISTICS)
        checksum = 0
        for first in range(0, shape.tiles, chunk):
            tiles = min(chunk, shape.tiles - first)
            start, stop = first * shape.tile, min((first + tiles) * shape.tile, shape.num_params)
            buffer.numbers[tiles - 1].zero_()  # the padding of the last tile is written as well
            for matrix, pieces in vectors.items():
                part = list(_between(pieces, start, stop))
                statistics[matrix] = ops.fill_row(part, buffer.numbers[:tiles, matrix], statistics[matrix])
            for t in range(tiles):
                checksum = zlib.crc32(buffer.bytes[t], checksum)
                _write(self._open_fd(), buffer.bytes[t], self._piece(first + t, row))
        return statistics, checksum

    def commit(self, accepted: Accepted) -> None:
        """Make a filled row count."""
        with self._lock:
            self._sequence += 1
            record = form.pack_record(accepted, self._sequence)
        self._flush()
        _write(self._open_fd(), record, form.record_offset(accepted.row))
        self._flush()

    def forget(self, rows: Sequence[int]) -> None:
        """Make rows nobody's; first of all readers are told that what they read may change."""
        if not rows:
            return
        fd = self._open_fd()
        with self._lock:
            self._epoch += 1
            _write(fd, form.pack_epoch(self._epoch), form.EPOCH_OFFSET)
        for row in rows:
            _write(fd, form.EMPTY_RECORD, form.record_offset(row))
        self._flush()

    def pack(self, rows: Sequence[int]) -> list[int]:
        """Rows are read in any order: nothing moves."""
        return list(rows)

    def read(self, row: int) -> Tensor:
        """One client's row ``[matrices, P]``."""
        pieces = _Pieces(self.shape.tiles, self.shape)
        for tile in range(self.shape.tiles):
            _read(self._open_fd(), pieces.bytes[tile], self._piece(tile, row))
        return pieces.numbers.transpose(0, 1).flatten(1)[:, : self.shape.num_params]

    def tiles(self, rows: Sequence[int]) -> ClientTiles:
        """The given rows, as rules read them."""
        return FileTiles(self, rows, self._epoch)

    def epoch(self) -> int:
        """How often rows were taken back: where that grew, rows may be other clients' than when they were loaded."""
        return form.unpack_epoch(os.pread(self._open_fd(), 8, form.EPOCH_OFFSET))

    def close(self) -> None:
        """Close the file and let another process write it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def tiles_per_span(self, clients: int) -> int:
        """Of the given number of clients: two spans fit into ``max_resident``, and none is longer than useful."""
        room = min(self._max_resident // 2, _SPAN_BYTES)
        return max(1, min(self.shape.tiles, room // (max(clients, 1) * self.shape.piece_bytes)))

    @contextmanager
    def reader(self) -> Iterator[int]:
        """The file once more, to read whole pages past the page cache, if the file system can."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        path = f"/proc/self/fd/{self._open_fd()}"
        whole_pages = self.shape.piece_bytes % PAGE == 0
        try:
            fd = os.open(path, flags | (os.O_DIRECT if whole_pages else 0))
        except OSError:
            fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def read_tiles(self, fd: int, to: _Pieces, rows: Sequence[int], first: int, tiles: int) -> None:
        """Read the rows of tiles ``[first, first + tiles)``, each stretch of neighbours at once."""
        K = len(rows)
        if list(rows) == list(range(self.shape.capacity)):
            _read(fd, to.bytes[: tiles * K].reshape(-1), self._piece(first, 0))
            return
        for tile in range(tiles):
            for start, stop in _stretches(rows):
                pieces = to.bytes[tile * K + start : tile * K + stop]
                _read(fd, pieces.reshape(-1), self._piece(first + tile, rows[start]))

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise RuntimeError("the store is closed")
        return self.fd

    def _flush(self) -> None:
        if self._sync:
            os.fdatasync(self._open_fd())

    def _piece(self, tile: int, row: int) -> int:
        """Offset of one client's piece of a tile."""
        return self._offset + tile * self._tile_bytes + row * self.shape.piece_bytes

    def _load(self) -> dict[Hashable, Accepted]:
        """The clients by id; of two contributions of one client, as a crash while replacing leaves, the later one."""
        self._epoch = self.epoch()
        latest: dict[Hashable, tuple[int, Accepted]] = {}
        stale = []
        records = os.pread(self.fd, self.shape.capacity * form.RECORD_BYTES, form.record_offset(0))
        for row in range(self.shape.capacity):
            record = self._record(records[row * form.RECORD_BYTES : (row + 1) * form.RECORD_BYTES], row)
            if record is None:
                continue
            accepted, sequence = record
            self._sequence = max(self._sequence, sequence)
            other, latest_accepted = latest.get(accepted.client, (0, accepted))
            if other < sequence:
                latest[accepted.client] = sequence, accepted
                accepted = latest_accepted
            if accepted is not latest[accepted.client][1]:
                stale.append(accepted.row)
        if self._writable:
            self.forget(stale)
        elif self.epoch() != self._epoch:
            return self._load()
        return {client: accepted for client, (_, accepted) in latest.items()}

    def _record(self, data: bytes, row: int) -> tuple[Accepted, int] | None:
        attempts = 1 if self._writable else _ATTEMPTS
        while True:
            attempts -= 1
            try:
                return form.unpack_record(data, row)
            except DamagedStoreError:
                if attempts == 0:
                    raise
            time.sleep(0.005)  # a writer may be in the middle of it: look again
            data = os.pread(self.fd, form.RECORD_BYTES, form.record_offset(row))

    def _verify(self, client: Accepted) -> None:
        piece = bytearray(self.shape.piece_bytes)
        checksum = 0
        for tile in range(self.shape.tiles):
            _read(self.fd, piece, self._piece(tile, client.row))
            checksum = zlib.crc32(piece, checksum)
        if checksum != client.checksum:
            raise DamagedStoreError(f"the data of client {client.client!r} are damaged: their checksum differs")


class FileTiles:
    """Rows of a file, read in spans: while one is used, a thread reads the next.

    The page cache is passed by where the file system allows: what is read once would only push out other things.
    """

    with_fishers: bool
    device = FileRows.device

    def __init__(self, rows: FileRows, chosen: Sequence[int], epoch: int) -> None:
        self._rows = rows
        self._chosen = chosen
        self._epoch = epoch
        self.with_fishers = rows.shape.with_fishers

    @property
    def num_params(self) -> int:
        """``P``."""
        return self._rows.shape.num_params

    @property
    def tile(self) -> int:
        """``L``, the number of parameters in a tile."""
        return self._rows.shape.tile

    def spans(self) -> Iterator[Span]:
        """The whole round; each span is in a buffer that the one after the next is read into."""
        shape = self._rows.shape
        step = self._rows.tiles_per_span(len(self._chosen))
        starts = range(0, shape.tiles, step)
        buffers = [_Pieces(step * len(self._chosen), shape) for _ in range(min(2, len(starts)))]
        with self._rows.reader() as fd, ThreadPoolExecutor(1) as ahead:
            reading = [ahead.submit(self._read, fd, buffers[0], 0, min(step, shape.tiles))]
            for i, first in enumerate(starts):
                reading.pop().result()
                if i + 1 < len(starts):
                    after = starts[i + 1]
                    tiles = min(step, shape.tiles - after)
                    reading.append(ahead.submit(self._read, fd, buffers[(i + 1) % 2], after, tiles))
                yield self._span(buffers[i % 2], first, min(step, shape.tiles - first))

    def window(self, first: int, num_params: int) -> Span:
        """The parameters ``[first, first + num_params)`` alone, which must lie in one tile."""
        shape = self._rows.shape
        tile, column = divmod(first, shape.tile)
        buffer = _Pieces(len(self._chosen), shape)
        with self._rows.reader() as fd:
            self._read(fd, buffer, tile, 1)
        span = self._span(buffer, tile, 1)
        columns = slice(column, column + num_params)
        fishers = None if span.fishers is None else span.fishers[:, :, columns]
        return Span(first, num_params, span.updates[:, :, columns], fishers)

    def _read(self, fd: int, buffer: _Pieces, first: int, tiles: int) -> None:
        self._rows.read_tiles(fd, buffer, self._chosen, first, tiles)
        if self._rows.epoch() != self._epoch:
            raise RuntimeError("clients were removed or replaced while the store was read: read it again")

    def _span(self, buffer: _Pieces, first: int, tiles: int) -> Span:
        shape = self._rows.shape
        size = (tiles, len(self._chosen), shape.matrices, shape.tile)
        numbers = buffer.numbers[: tiles * len(self._chosen)].view(size)
        start = first * shape.tile
        return Span(
            start,
            min(tiles * shape.tile, shape.num_params - start),
            numbers[:, :, UPDATE],
            numbers[:, :, FISHER] if self.with_fishers else None,
        )


class _Pieces:
    """A buffer of pieces, each one client's part of a tile, as numbers and as bytes."""

    def __init__(self, count: int, shape: StoreShape) -> None:
        pages = mmap.mmap(-1, max(count, 1) * shape.piece_bytes)  # reads past the page cache go to whole pages
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        self.numbers = memory.view(shape.dtype).view(-1, shape.matrices, shape.tile)
        self.bytes = memory.numpy().reshape(-1, shape.piece_bytes)


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions ``[start, stop)`` of rows that follow each other in the file."""
    start = 0
    for k in range(1, len(rows) + 1):
        if k == len(rows) or rows[k] != rows[k - 1] + 1:
            yield start, k
            start = k


def _between(pieces: Sequence[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """Numbers ``[start, stop)`` of a vector in pieces."""
    for piece in pieces:
        if start < len(piece) and stop > 0:
            yield piece[max(start, 0) : stop]
        start, stop = start - len(piece), stop - len(piece)


def _write(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _read(fd: int, to: Any, offset: int) -> None:
    view = memoryview(to)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise DamagedStoreError("the file ends early: it was truncated while open")
        view, offset = view[count:], offset + count


def _flush_folder(path: str | os.PathLike[str]) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
