"""Where a store keeps its clients' rows: the shape that memory and file share, and the memory."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.server.shared_memory import SharedTensor
from fdcr_fast.server.tiles import ClientTiles, MatrixTiles

UPDATE, FISHER = -1, 0  # positions of a row's matrices; a store without Fishers has the updates alone


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype, also by its name in PyTorch.

    Raises:
        TypeError: it is none.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype):
        raise TypeError(f"expected a torch.dtype or its name, such as 'bfloat16', got {dtype!r}")
    return named


@dataclass(frozen=True)
class StoreShape:
    """Rows ``[T, capacity, matrices, L]``; parameter ``p`` lies in tile ``p // L`` at ``p % L``."""

    num_params: int
    capacity: int
    tile: int
    dtype: torch.dtype
    with_fishers: bool

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise TypeError(f"expected a floating-point dtype, got {self.dtype}")
        for name in ("num_params", "capacity", "tile"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    @property
    def matrices(self) -> int:
        """Two, Fisher and update, or one."""
        return 2 if self.with_fishers else 1

    @property
    def tiles(self) -> int:
        """``T``."""
        return -(-self.num_params // self.tile)

    @property
    def piece_bytes(self) -> int:
        """Of one client in one tile."""
        return self.matrices * self.tile * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.tiles * self.capacity * self.piece_bytes


@dataclass(frozen=True)
class Accepted:
    """A client's row, the statistics of what it holds, and in a file its checksum."""

    client: Hashable
    row: int
    num_samples: float
    squared_norm: float  # NaN where the update has not been read
    fisher_min: float
    fisher_max: float
    checksum: int


Vectors = Mapping[int, Sequence[Tensor]]  # by UPDATE and FISHER, each in pieces that make up [P]
Statistics = dict[int, Tensor]  # likewise: float64 (squared norm, smallest, largest)

NO_STATISTICS = torch.tensor([0.0, torch.inf, -torch.inf], dtype=torch.float64)


class FreeRows:
    """The rows that no client has; the first one is taken first."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows = set(rows)
        self._heap = sorted(self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def take(self, row: int | None = None) -> int:
        """The given row, or the first one.

        Raises:
            ValueError: it is not free.
        """
        while row is None:
            first = heapq.heappop(self._heap)  # rows that were taken by number are still in the heap
            row = first if first in self._rows else None
        if row not in self._rows:
            raise ValueError(f"row {row} is not free")
        self._rows.remove(row)
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        self._rows.add(row)
        heapq.heappush(self._heap, row)


class MemoryRows:
    """Rows in one tensor, which other processes can be given if it is shared, and which the system may not move if it
    is pinned.

    Raises:
        ValueError: the memory that is left does not hold them.
    """

    def __init__(self, shape: StoreShape, device: torch.device, shared: bool = False, pinned: bool = False) -> None:
        self.shape = shape
        self.device = device
        self._shared = None
        _check_memory(shape, device)
        size = (shape.tiles, shape.capacity, shape.matrices, shape.tile)
        if shared:
            self._shared = SharedTensor(size, shape.dtype)
            self.data = self._shared.tensor
        else:
            self.data = torch.empty(size, dtype=shape.dtype, device=device, pin_memory=pinned)

    def __getstate__(self) -> tuple[StoreShape, SharedTensor]:
        if self._shared is None:
            raise TypeError("this store is not shared with other processes: make it with shared=True")
        return self.shape, self._shared

    def __setstate__(self, state: tuple[StoreShape, SharedTensor]) -> None:
        self.shape, self._shared = state
        self.data = self._shared.tensor
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

    def commit(self, accepted: Accepted) -> None:
        """Memory has nothing to write down."""

    def forget(self, rows: Sequence[int]) -> None:
        """Nor to take back."""

    def mark_round(self, ended: bool) -> None:
        """Nor to remember."""

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
        packed = self.data[:, : len(rows)]
        return MatrixTiles(
            packed[:, :, UPDATE], packed[:, :, FISHER] if self.shape.with_fishers else None, self.shape.num_params
        )

    def close(self) -> None:
        """Memory is freed with its last view."""


def _check_memory(shape: StoreShape, device: torch.device) -> None:
    available = available_memory() if device.type == "cpu" else None
    if available is not None and shape.nbytes > available:
        raise ValueError(
            f"a store of {shape.capacity} clients with {shape.num_params} parameters takes {giga(shape.nbytes)}, and "
            f"{giga(available)} of memory are left: take fewer clients, a narrower dtype, or a file (path=)"
        )


def available_memory() -> int | None:
    """Bytes that this process can still take, by the system and by its control group; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int(group.joinpath("memory.max").read_text())  # "max" without a limit
        statistics = dict(line.split() for line in group.joinpath("memory.stat").read_text().splitlines())
        used = int(group.joinpath("memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):
        return available
    return min(available, max(limit - used, 0))


def giga(nbytes: int) -> str:
    """A size in a message."""
    return f"{nbytes / 2**30:.3g} GiB"
