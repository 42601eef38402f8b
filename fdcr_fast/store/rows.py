"""Rows of a store, wherever they lie: their shape, what is known of one, and which are free."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
