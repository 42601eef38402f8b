"""Rows of a store, wherever they lie: their shape, what is known of one, and what can be done with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.round.tiles import ClientTiles

UPDATE, FISHER = -1, 0  # positions of a row's matrices; a store without Fishers has the updates alone


def as_dtype(argument: str, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that an argument gives, also by its name in PyTorch.

    Raises:
        TypeError: it is none.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype):
        raise TypeError(f"expected {argument} to be a torch.dtype or its name, such as 'bfloat16', got {dtype!r}")
    return named


def check_integer(argument: str, value: Any) -> None:
    """Raise TypeError unless an argument is an integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument} must be an integer, got {value!r}")


def check_size(argument: str, value: Any) -> None:
    """Raise unless an argument is a positive integer.

    Raises:
        TypeError: it is no integer.
        ValueError: it is 0 or less.
    """
    check_integer(argument, value)
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless these arguments are True or False."""
    for argument, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{argument} must be True or False, got {value!r}")


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
            check_size(name, getattr(self, name))

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
        """Bytes of one client in one tile."""
        return self.matrices * self.tile * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
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


class Contribution(NamedTuple):
    """What the store holds of one client.

    Attributes:
        client: Its id.
        update: ``delta_k [P]``, a copy.
        fisher: ``F_k [P]``, a copy; None in a store without Fishers.
        num_samples: ``n_k``.
    """

    client: Hashable
    update: Tensor
    fisher: Tensor | None
    num_samples: float


Vectors = Mapping[int, Sequence[Tensor]]  # by UPDATE and FISHER, each in pieces that make up [P]
Statistics = dict[int, Tensor]  # by UPDATE and FISHER: float64 (squared norm, smallest, largest)

NO_STATISTICS = torch.tensor([0.0, torch.inf, -torch.inf], dtype=torch.float64)


class Rows(Protocol):
    """The rows of a store, which lie in memory, in a file, or in the tensors in which they came."""

    @property
    def shape(self) -> StoreShape:
        """The shape of all rows."""

    @property
    def device(self) -> torch.device:
        """The device that clients' vectors are brought to."""

    @property
    def unread(self) -> bool:
        """Whether rows are looked at when they are aggregated, and not when they come."""

    def fill(self, row: int, vectors: Vectors, base: Tensor | None = None) -> tuple[Statistics, int]:
        """Put a client's vectors, the update less the base, into a row that is nobody's yet.

        Returns:
            Their statistics, and a checksum, which is 0 where there is none.
        """

    def ranges(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest number of the Fisher in each row, float64; None if statistics told them when it came."""

    def commit(self, accepted: Accepted) -> None:
        """Make a filled row count."""

    def forget(self, rows: Sequence[int]) -> None:
        """Make rows nobody's."""

    def mark_round(self, ended: bool) -> None:
        """Note whether the round has ended, for whoever opens the rows later."""

    def pack(self, rows: Sequence[int]) -> list[int]:
        """The rows in which the given ones, in this order, lie from now on: they may be moved to the front."""

    def read(self, row: int) -> Tensor:
        """One client's row ``[matrices, P]``, a copy."""

    def tiles(self, rows: Sequence[int]) -> ClientTiles:
        """The given rows, which are packed, as rules read them."""

    def close(self) -> None:
        """Let go of what is open."""
