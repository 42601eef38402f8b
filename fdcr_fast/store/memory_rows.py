"""Rows in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.memory import available_memory, empty, giga
from fdcr_fast.round.tiles import ClientTiles, MatrixTiles
from fdcr_fast.store.rows import FISHER, NO_STATISTICS, UPDATE, Accepted, Statistics, StoreShape, Vectors
from fdcr_fast.store.shared_memory import SharedTensor


class MemoryRows:
    """Rows in one tensor, which other processes can be given if it is shared, and which the system may not move if it
    is pinned.

    ``data [T, capacity, matrices, L]`` is a view: the tiles of one matrix lie side by side, so that whoever reads the
    updates alone reads all of what memory gives at a time. Pinned memory, of which whole tiles are copied, has both
    matrices of a tile together.

    Raises:
        ValueError: the memory that is left does not hold them.
    """

    unread = False

    def __init__(self, shape: StoreShape, device: torch.device, shared: bool = False, pinned: bool = False) -> None:
        self.shape = shape
        self.device = device
        self._shared = None
        _check_memory(shape, device)
        if pinned:
            size = (shape.tiles, shape.capacity, shape.matrices, shape.tile)
            self.data = torch.empty(size, dtype=shape.dtype, device=device, pin_memory=True)
            return
        size = (shape.matrices, shape.tiles, shape.capacity, shape.tile)
        if shared:
            self._shared = SharedTensor(size, shape.dtype)
        matrices = empty(size, shape.dtype, device, lasting=True) if self._shared is None else self._shared.tensor
        self.data = _by_client(matrices)

    def __getstate__(self) -> tuple[StoreShape, SharedTensor]:
        if self._shared is None:
            raise TypeError("this store is not shared with other processes: make it with shared=True")
        return self.shape, self._shared

    def __setstate__(self, state: tuple[StoreShape, SharedTensor]) -> None:
        self.shape, self._shared = state
        self.data = _by_client(self._shared.tensor)
        self.device = self.data.device

    def fill(self, row: int, vectors: Vectors, base: Tensor | None = None) -> tuple[Statistics, int]:
        """Copy a client's vectors, the update less the base, into a row that is nobody's yet.

        Returns:
            Their statistics, and no checksum.
        """
        return {
            matrix: ops.fill_row(pieces, self.data[:, row, matrix], NO_STATISTICS, base if matrix == UPDATE else None)
            for matrix, pieces in vectors.items()
        }, 0

    def ranges(self, rows: Sequence[int]) -> None:
        """None: every row was looked at when it was filled."""

    def commit(self, accepted: Accepted) -> None:
        """Memory has nothing to write down."""

    def forget(self, rows: Sequence[int]) -> None:
        """Memory has nothing to take back: the row is filled again."""

    def mark_round(self, ended: bool) -> None:
        """Memory is not opened again: nobody would ask."""

    def pack(self, rows: Sequence[int]) -> list[int]:
        """Move the given rows to the front, in this order, where they are not; each moves into a gap."""
        for position, row in enumerate(rows):
            if position != row:
                self.data[:, position].copy_(self.data[:, row])
        return list(range(len(rows)))

    def read(self, row: int) -> Tensor:
        """One client's row ``[matrices, P]``, a copy."""
        return self.data[:, row].transpose(0, 1).flatten(1)[:, : self.shape.num_params].clone()

    def tiles(self, rows: Sequence[int]) -> ClientTiles:
        """The packed rows, as rules read them; views."""
        packed = self.data.narrow(1, 0, len(rows))
        fishers = packed.select(2, FISHER) if self.shape.with_fishers else None
        return MatrixTiles(packed.select(2, UPDATE), fishers, self.shape.num_params)

    def close(self) -> None:
        """Memory is freed with its last view."""


def _by_client(matrices: Tensor) -> Tensor:
    """``[matrices, T, capacity, L]`` as ``[T, capacity, matrices, L]``."""
    return matrices.permute(1, 2, 0, 3)


def _check_memory(shape: StoreShape, device: torch.device) -> None:
    available = available_memory() if device.type == "cpu" else None
    if available is not None and shape.nbytes > available:
        raise ValueError(
            f"a store of {shape.capacity} clients with {shape.num_params} parameters takes {giga(shape.nbytes)}, and "
            f"{giga(available)} of memory are left: take fewer clients, a narrower dtype, or a file (path=)"
        )
