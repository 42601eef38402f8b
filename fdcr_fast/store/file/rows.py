"""Rows in a file: written so that a crash leaves whole contributions only."""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
import zlib
from collections.abc import Hashable, Sequence
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.memory import giga
from fdcr_fast.ops.vectors import SplitVector
from fdcr_fast.round.tiles import ClientTiles
from fdcr_fast.store.file import format as form
from fdcr_fast.store.file.format import PAGE, DamagedStoreError
from fdcr_fast.store.file.tiles import BUFFERS, FileTiles, Pieces, check_epoch, read
from fdcr_fast.store.rows import NO_STATISTICS, UPDATE, Accepted, Statistics, StoreShape, Vectors
from fdcr_fast.store.store_tiles import whole_stretches

_RESIDENT = 1 << 28
_CHUNK_BYTES = 1 << 22  # of one client that are converted before they are written
_ATTEMPTS = 5  # to read a record that another process may be writing
_PIECE_BYTES = 1 << 16  # of one vector in one tile: long enough to write and read at full speed


class FileRows:
    """Rows in an open file.

    A contribution is written in three steps: its data, a flush, and its record with a checksum, which alone makes the
    row count; then another flush. Taking one back empties the record before the row is used again.
    """

    device = FileTiles.device
    unread = False

    def __init__(self, file: FileIO, shape: StoreShape, max_resident: int | None, sync: bool) -> None:
        self._file = file
        self.shape = shape
        needed = BUFFERS * whole_stretches(shape, 0) * shape.capacity * shape.piece_bytes
        self._max_resident = max(_RESIDENT, needed) if max_resident is None else max_resident
        self._sync = sync
        self._writable = file.writable()
        self._lock = threading.Lock()
        self._sequence = 0
        self._epoch = form.read_epoch(self._fd())
        if self._max_resident < needed:
            raise ValueError(
                f"max_resident must be at least {needed}, {BUFFERS} spans of all clients, got {max_resident}"
            )

    @staticmethod
    def tile(num_params: int, capacity: int, dtype: torch.dtype, with_fishers: bool, max_resident: int | None) -> int:
        """Tiles of whole stretches and pages, up to 64 KiB of a vector, such that ``max_resident`` holds four."""
        if num_params <= ops.STRETCH:
            page = PAGE // dtype.itemsize
            return -(-num_params // page) * page
        vectors = capacity * (2 if with_fishers else 1)
        room = min((max_resident or _RESIDENT) // (4 * vectors), _PIECE_BYTES) // dtype.itemsize
        return max(min(room, num_params) // ops.STRETCH, 1) * ops.STRETCH

    @classmethod
    def create(cls, path: str | os.PathLike[str], shape: StoreShape, max_resident: int | None, sync: bool) -> FileRows:
        """A new file, its header written when all its room is reserved."""
        if shape.dtype not in form.DTYPES:
            raise TypeError(f"a file holds float32, float64, bfloat16 or float16, got {shape.dtype}")
        file = FileIO(path, "x+")
        try:
            fd = file.fileno()
            _lock(fd, path)
            _reserve(fd, form.data_offset(shape) + shape.nbytes)
            rows = cls(file, shape, max_resident, sync)
            rows._flush()
            _write(fd, form.pack_header(shape), 0)
            rows._flush()
            if sync:
                _flush_folder(path)
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        return rows

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], writable: bool, max_resident: int | None, sync: bool, verify: bool
    ) -> tuple[FileRows, dict[Hashable, Accepted]]:
        """An existing file and its clients."""
        file = FileIO(path, "r+" if writable else "r")
        try:
            fd = file.fileno()
            if writable:
                _lock(fd, path)
            shape = form.unpack_header(os.pread(fd, PAGE, 0))
            expected, size = form.data_offset(shape) + shape.nbytes, os.fstat(fd).st_size
            if size != expected:
                raise DamagedStoreError(f"the file has {size} bytes, expected {expected}")
            rows = cls(file, shape, max_resident, sync)
            accepted = rows._load()
            if verify:
                for client in accepted.values():
                    rows._verify(client)
        except DamagedStoreError as error:
            file.close()
            raise DamagedStoreError(f"{os.fspath(path)!r} cannot be opened: {error}") from None
        except BaseException:
            file.close()
            raise
        return rows, accepted

    def fill(self, row: int, vectors: Vectors, base: Tensor | None = None) -> tuple[Statistics, int]:
        """Write a client's vectors, the update less the base, into a row that is nobody's yet.

        Returns:
            Their statistics, and the checksum of the row.
        """
        fd, shape = self._fd_to_write(), self.shape
        unit = math.lcm(shape.tile, ops.STRETCH) // shape.tile  # tiles of parts that have the statistics of the whole
        room = min(_CHUNK_BYTES, self._max_resident) // shape.piece_bytes
        chunk = min(max(room // unit, 1) * unit, shape.tiles)
        buffer = Pieces(chunk, shape)
        split = {matrix: SplitVector(pieces) for matrix, pieces in vectors.items()}
        statistics = dict.fromkeys(vectors, NO_STATISTICS)
        checksum = 0
        for first in range(0, shape.tiles, chunk):
            tiles = min(chunk, shape.tiles - first)
            start, stop = first * shape.tile, min((first + tiles) * shape.tile, shape.num_params)
            buffer.numbers[tiles - 1].zero_()  # the padding of the last tile is written as well
            for matrix, vector in split.items():
                less = base[start:stop] if base is not None and matrix == UPDATE else None
                part = vector.between(start, stop)
                statistics[matrix] = ops.fill_row(part, buffer.numbers[:tiles, matrix], statistics[matrix], less)
            for t in range(tiles):
                checksum = zlib.crc32(buffer.bytes[t], checksum)
                _write(fd, buffer.bytes[t], form.piece_offset(shape, first + t, row))
        return statistics, checksum

    def ranges(self, rows: Sequence[int]) -> None:
        """None: every row was looked at when it was filled."""

    def commit(self, accepted: Accepted) -> None:
        """Make a filled row count."""
        with self._lock:
            self._sequence += 1
            record = form.pack_record(accepted, self._sequence)
        self._flush()
        _write(self._fd_to_write(), record, form.record_offset(accepted.row))
        self._flush()

    def forget(self, rows: Sequence[int]) -> None:
        """Make rows nobody's; first of all readers are told that what they read may change."""
        if not rows:
            return
        fd = self._fd_to_write()
        with self._lock:
            self._epoch += 1
            _write(fd, form.pack_epoch(self._epoch), form.EPOCH_OFFSET)
        for row in rows:
            _write(fd, form.EMPTY_RECORD, form.record_offset(row))
        self._flush()

    def mark_round(self, ended: bool) -> None:
        """Write down whether the round has ended; whoever only reads the file leaves that to its writer."""
        if self._writable:
            _write(self._fd(), form.pack_ended(ended), form.ENDED_OFFSET)
            self._flush()

    def round_ended(self) -> bool:
        """Whether the round has ended, as it was written down."""
        return form.read_ended(self._fd())

    def pack(self, rows: Sequence[int]) -> list[int]:
        """Rows are read in any order: nothing moves."""
        return list(rows)

    def read(self, row: int) -> Tensor:
        """One client's row ``[matrices, P]``."""
        fd, shape = self._fd(), self.shape
        pieces = Pieces(shape.tiles, shape)
        for tile in range(shape.tiles):
            read(fd, pieces.bytes[tile], form.piece_offset(shape, tile, row))
        check_epoch(fd, self._epoch)
        return pieces.numbers.transpose(0, 1).flatten(1)[:, : shape.num_params]

    def tiles(self, rows: Sequence[int]) -> ClientTiles:
        """The given rows, as rules read them."""
        return FileTiles(self._fd, self.shape, rows, self._epoch, self._max_resident)

    def close(self) -> None:
        """Close the file and let another process write it."""
        self._file.close()

    def _fd(self) -> int:
        if self._file.closed:
            raise RuntimeError("the store is closed")
        return self._file.fileno()

    def _fd_to_write(self) -> int:
        fd = self._fd()
        if not self._writable:
            raise RuntimeError("the store was opened for reading")
        return fd

    def _flush(self) -> None:
        if self._sync:
            os.fdatasync(self._fd())

    def _load(self) -> dict[Hashable, Accepted]:
        """The clients by id; of two contributions of one client, as a crash while replacing leaves, the later one."""
        fd, shape = self._fd(), self.shape
        self._epoch = form.read_epoch(fd)
        records = os.pread(fd, shape.capacity * form.RECORD_BYTES, form.record_offset(0))
        found = []
        for row in range(shape.capacity):
            record = self._record(records[row * form.RECORD_BYTES : (row + 1) * form.RECORD_BYTES], row)
            if record is not None:
                found.append(record)
        found.sort(key=lambda record: record[1])
        latest = {accepted.client: accepted for accepted, _ in found}
        self._sequence = found[-1][1] if found else 0
        if self._writable:
            self.forget([accepted.row for accepted, _ in found if latest[accepted.client] is not accepted])
        elif form.read_epoch(fd) != self._epoch:
            return self._load()
        return latest

    def _record(self, data: bytes, row: int) -> tuple[Accepted, int] | None:
        attempts = 1 if self._writable else _ATTEMPTS
        while True:
            attempts -= 1
            try:
                return form.unpack_record(data, row)
            except DamagedStoreError:
                if attempts == 0:
                    raise
            time.sleep(0.001)  # a writer may be in the middle of it: look again
            data = os.pread(self._fd(), form.RECORD_BYTES, form.record_offset(row))

    def _verify(self, client: Accepted) -> None:
        piece = bytearray(self.shape.piece_bytes)
        checksum = 0
        for tile in range(self.shape.tiles):
            read(self._fd(), piece, form.piece_offset(self.shape, tile, client.row))
            checksum = zlib.crc32(piece, checksum)
        if checksum != client.checksum:
            raise DamagedStoreError(f"the data of client {client.client!r} are damaged: their checksum differs")


def _write(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _lock(fd: int, path: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another process has {os.fspath(path)!r} open for writing") from None


def _reserve(fd: int, nbytes: int) -> None:
    disk = os.fstatvfs(fd)
    left = disk.f_bavail * disk.f_frsize
    if nbytes > left:
        raise ValueError(f"the store takes {giga(nbytes)}, and {giga(left)} of disk are left")
    os.posix_fallocate(fd, 0, nbytes)


def _flush_folder(path: str | os.PathLike[str]) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
