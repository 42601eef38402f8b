"""The bytes of a store's header and records; docs/store-format.md describes the file."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Hashable

import torch

from fdcr_fast.store.rows import Accepted, StoreShape

PAGE = 4096
RECORD_BYTES = 512  # what disks write whole
EPOCH_OFFSET = 2048  # within the header's page
ENDED_OFFSET = 2056

_MAGIC = b"FDCRSTOR"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQI")  # magic, version, dtype, num_params, capacity, tile, matrices
_RECORD = struct.Struct("<QddddIH")  # sequence, num_samples, squared_norm, min, max, data checksum, id length
_CHECKSUM = struct.Struct("<I")
_EPOCH = struct.Struct("<Q")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
EMPTY_RECORD = bytes(RECORD_BYTES)


class DamagedStoreError(ValueError):
    """A store's file is not what was written."""


def data_offset(shape: StoreShape) -> int:
    """The offset at which the rows begin: after the header's page and the records, on a page."""
    return PAGE + -(-shape.capacity * RECORD_BYTES // PAGE) * PAGE


def record_offset(row: int) -> int:
    """The offset of the record of a row."""
    return PAGE + row * RECORD_BYTES


def piece_offset(shape: StoreShape, tile: int, row: int) -> int:
    """The offset of one client's piece of a tile."""
    return data_offset(shape) + (tile * shape.capacity + row) * shape.piece_bytes


def pack_header(shape: StoreShape) -> bytes:
    """The header with its checksum."""
    body = _HEADER.pack(
        _MAGIC, _VERSION, DTYPES[shape.dtype], shape.num_params, shape.capacity, shape.tile, shape.matrices
    )
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack_header(page: bytes) -> StoreShape:
    """The shape in a header.

    Raises:
        DamagedStoreError: it is none, of another version, or damaged.
    """
    body, rest = page[: _HEADER.size], page[_HEADER.size : _HEADER.size + _CHECKSUM.size]
    if not page.strip(b"\0"):
        raise DamagedStoreError("the header is empty: the store was never finished; delete the file")
    if len(page) < PAGE or not body.startswith(_MAGIC):
        raise DamagedStoreError("it is no store: the header does not begin with FDCRSTOR")
    if _CHECKSUM.unpack(rest)[0] != zlib.crc32(body):
        raise DamagedStoreError("the header is damaged: its checksum differs")
    _, version, dtype, num_params, capacity, tile, matrices = _HEADER.unpack(body)
    if version != _VERSION:
        raise DamagedStoreError(f"it is of version {version}, and this library reads version {_VERSION}")
    return StoreShape(num_params, capacity, tile, list(DTYPES)[dtype], matrices == 2)


def pack_epoch(epoch: int) -> bytes:
    """The bytes at ``EPOCH_OFFSET``."""
    return _EPOCH.pack(epoch)


def read_epoch(fd: int) -> int:
    """How often rows were taken back: where that grew, rows may be other clients' than when they were loaded."""
    return int(_EPOCH.unpack(os.pread(fd, _EPOCH.size, EPOCH_OFFSET))[0])


def pack_ended(ended: bool) -> bytes:
    """The byte at ``ENDED_OFFSET``."""
    return bytes([ended])


def read_ended(fd: int) -> bool:
    """Whether the round was aggregated, so that the next contribution begins another one."""
    return os.pread(fd, 1, ENDED_OFFSET) == b"\1"


def pack_record(accepted: Accepted, sequence: int) -> bytes:
    """The record of a row, with its checksum; ValueError where the client's id does not fit."""
    client = _pack_id(accepted.client)
    body = _RECORD.pack(
        sequence,
        accepted.num_samples,
        accepted.squared_norm,
        accepted.fisher_min,
        accepted.fisher_max,
        accepted.checksum,
        len(client),
    )
    padded = (body + client).ljust(RECORD_BYTES - _CHECKSUM.size, b"\0")
    return padded + _CHECKSUM.pack(zlib.crc32(padded))


def unpack_record(data: bytes, row: int) -> tuple[Accepted, int] | None:
    """What the record of a row says, and its sequence number; None of a row without a client.

    Raises:
        DamagedStoreError: it is damaged.
    """
    if data == EMPTY_RECORD:
        return None
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if len(data) < RECORD_BYTES or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
        raise DamagedStoreError(f"the record of row {row} is damaged: its checksum differs")
    sequence, count, norm, low, high, data_checksum, length = _RECORD.unpack_from(body)
    client = json.loads(body[_RECORD.size : _RECORD.size + length])
    return Accepted(client, row, count, norm, low, high, data_checksum), sequence


def _pack_id(client: Hashable) -> bytes:
    if type(client) not in (str, int):
        raise ValueError(f"client ids in a file are str or int, got {type(client).__name__}")
    data = json.dumps(client).encode()
    room = RECORD_BYTES - _RECORD.size - _CHECKSUM.size
    if len(data) > room:
        raise ValueError(f"client ids in a file have up to {room} bytes, got {len(data)}")
    return data
