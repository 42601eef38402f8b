"""Tiled client matrices as rules read them, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fdcr_fast.round.arguments import check_device, check_floating


@dataclass(frozen=True)
class Span:
    """Consecutive parameters of all clients, ``[first, first + num_params)``, as tiled client matrices.

    Attributes:
        first: The first parameter.
        num_params: How many there are.
        updates: Tiled ``[T', K, L]``.
        fishers: Fishers ``[T, K, L]``, or None where there are none.
    """

    first: int
    num_params: int
    updates: Tensor
    fishers: Tensor | None


class ClientVectors(NamedTuple):
    """The rows of one round where they came; see :func:`fdcr_fast.ops.aggregate_vectors`.

    Attributes:
        updates: Vectors that make up the updates, one client after the other.
        base: ``[P]`` that is yet to be taken from each; None for nothing.
        fishers: Vectors that make up the Fishers; empty where there are none.
    """

    updates: list[Tensor]
    base: Tensor | None
    fishers: list[Tensor]


class ClientTiles(Protocol):
    """The rows of one round, wherever they lie."""

    @property
    def num_params(self) -> int:
        """``P``."""

    @property
    def tile(self) -> int:
        """``L``, the number of parameters in a tile."""

    @property
    def device(self) -> torch.device:
        """The device of the spans."""

    @property
    def with_fishers(self) -> bool:
        """Whether the spans have Fishers."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of updates and Fishers."""

    @property
    def windows(self) -> int:
        """In how many places a few parameters are read without much more than these being read."""

    @property
    def vectors(self) -> ClientVectors | None:
        """The rows as they came, where an operator can read them there faster than span by span."""

    def spans(self) -> Iterable[Span]:
        """The whole round in the order of the parameters, cut between tiles; a span is valid until the next one."""

    def window(self, first: int, num_params: int) -> Span:
        """The parameters ``[first, first + num_params)`` alone, which must lie in one tile."""


class MatrixTiles:
    """Rows in tiled client matrices in memory, in one span.

    Args:
        updates: Tiled ``[T, K, L]``.
        fishers: Tiled ``[T, K, L]``, or None.
        num_params: ``P``.
    """

    windows = 16
    vectors: ClientVectors | None = None

    def __init__(self, updates: Tensor, fishers: Tensor | None, num_params: int) -> None:
        self.updates, self.fishers, self.num_params = updates, fishers, num_params
        self.tile, self.device, self.with_fishers = updates.shape[2], updates.device, fishers is not None
        self.dtypes = frozenset([updates.dtype] if fishers is None else [updates.dtype, fishers.dtype])

    @classmethod
    def of(cls, updates: Tensor, fishers: Tensor | None) -> MatrixTiles:
        """View ``updates [K, P]`` and ``fishers [K, P]``, of any strides, as one tile; nothing is copied.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes or devices do not fit, or there is no client or no parameter.
        """
        check_floating("updates", updates, "[K, P]")
        K, P = updates.shape
        if K == 0 or P == 0:
            raise ValueError(f"expected at least one client and one parameter, got updates [{K}, {P}]")
        if fishers is not None:
            check_floating("fishers", fishers, "[K, P]")
            if fishers.shape != (K, P):
                raise ValueError(f"expected fishers [{K}, {P}] like updates, got {list(fishers.shape)}")
            check_device("fishers", fishers, updates.device)
            fishers = fishers.detach().unsqueeze(0)
        return cls(updates.detach().unsqueeze(0), fishers, P)

    def spans(self) -> tuple[Span]:
        """Everything at once."""
        return (Span(0, self.num_params, self.updates, self.fishers),)

    def window(self, first: int, num_params: int) -> Span:
        """Views of the parameters ``[first, first + num_params)``, which must lie in one tile."""
        tile, column = divmod(first, self.tile)
        columns = slice(column, column + num_params)
        fishers = None if self.fishers is None else self.fishers[tile : tile + 1, :, columns]
        return Span(first, num_params, self.updates[tile : tile + 1, :, columns], fishers)
