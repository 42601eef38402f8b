"""Where the rows of a new store lie: what its arguments ask for, and which of them exclude each other."""

from __future__ import annotations

import os

import torch

from fdcr_fast import ops
from fdcr_fast.store.borrowed_rows import BorrowedRows
from fdcr_fast.store.file.rows import FileRows
from fdcr_fast.store.memory_rows import MemoryRows
from fdcr_fast.store.pinned_rows import PinnedRows
from fdcr_fast.store.rows import Rows, StoreShape, check_flags, check_size

_MEMORY_TILE = 32  # a line of columns of csrc/cpu/clients/aggregation.inc: what is read next then always lies next


def memory_shape(
    num_params: int,
    capacity: int,
    dtype: torch.dtype,
    tile: int | None,
    with_fishers: bool,
    longest: int = _MEMORY_TILE,
) -> StoreShape:
    """The shape of rows in memory, by default in tiles of up to ``longest`` parameters."""
    check_size("num_params", num_params)
    return StoreShape(num_params, capacity, min(longest, num_params) if tile is None else tile, dtype, with_fishers)


def new_rows(
    num_params: int,
    capacity: int,
    dtype: torch.dtype,
    *,
    tile: int | None,
    device: torch.device | str,
    compute_device: torch.device | str | None,
    with_fishers: bool,
    path: str | os.PathLike[str] | None,
    max_resident: int | None,
    sync: bool,
    shared: bool,
    copy: bool,
) -> Rows:
    """Rows in memory, in pinned memory, in a file, or in the clients' tensors; see :class:`UpdateStore`.

    Raises:
        TypeError: an argument is of another type than it can be.
        ValueError: a size is not positive, arguments exclude each other, or there is not enough memory or disk.
        FileExistsError: there is a file at ``path``.
    """
    check_flags(with_fishers=with_fishers, sync=sync, shared=shared, copy=copy)
    device = torch.device(device)
    reader = device if compute_device is None else torch.device(compute_device)
    pinned = reader != device
    check_file_arguments(path, max_resident)
    if path is None:
        longest = ops.STRETCH if pinned or not copy else _MEMORY_TILE
        shape = memory_shape(num_params, capacity, dtype, tile, with_fishers, longest)
    else:
        check_size("num_params", num_params)
        check_size("capacity", capacity)
        if tile is None:
            tile = FileRows.tile(num_params, capacity, dtype, with_fishers, max_resident)
        shape = StoreShape(num_params, capacity, tile, dtype, with_fishers)
    if pinned and (path is not None or shared or device.type != "cpu"):
        raise ValueError("a store with a compute_device of its own lies in memory of this process, on the CPU")
    if path is not None and device.type != "cpu":
        raise ValueError(f"a store in a file is read on the CPU, not on {device}")
    if shared and (path is not None or device.type != "cpu"):
        raise ValueError("a shared store lies in memory, on the CPU; other processes open one in a file by its path")
    if not copy and (path is not None or shared or pinned):
        raise ValueError("a store that does not copy has no memory of its own: no path, shared, or compute_device")
    if pinned:
        return PinnedRows(shape, reader)
    if not copy:
        return BorrowedRows(shape, device)
    if path is None:
        return MemoryRows(shape, device, shared)
    return FileRows.create(path, shape, max_resident, sync)


def check_file_arguments(path: str | os.PathLike[str] | None, max_resident: int | None) -> None:
    """Raise unless there can be a file at the path, and so many bytes for reading it.

    Raises:
        TypeError: the path is no path, or the bytes are no integer.
        ValueError: there are no bytes, or there is no path that they could be for.
    """
    if path is not None and not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path must be a string or a path, got {path!r}")
    if max_resident is not None:
        check_size("max_resident", max_resident)
        if path is None:
            raise ValueError("max_resident is for a store in a file: give its path as well")
