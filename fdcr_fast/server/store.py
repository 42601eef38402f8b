"""The clients' uploads of one round, validated as they arrive, in the order in which they are aggregated."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.layout import as_tensor
from fdcr_fast.server.intake import ClientUpdates, rejection_reason

_BLOCK_BYTES = 1 << 19  # one tile of all clients should fit into a core's second-level cache


class UpdateStore:
    """Updates and Fishers of up to ``capacity`` clients in one tensor ``[T, capacity, 2, L]``, Fisher first.

    Parameter ``p`` lies in tile ``p // L`` at ``p % L``, so that every pass over all clients reads memory in
    sequence, and what one pass read of a tile is still cached for the next. Clients may arrive in any order,
    each with one copy.

    Args:
        num_params: ``P``.
        capacity: Largest number of accepted clients in a round.
        dtype: In which updates and Fishers are kept.
        tile: ``L``; by default such that a tile of all clients fits into cache.
        device: Where they are kept.
        with_fishers: False for a store without Fishers, for rules that need none; half the memory.

    Attributes:
        rejected: Reason by client id of those that were not accepted.
    """

    def __init__(
        self,
        num_params: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        *,
        tile: int | None = None,
        device: torch.device | str = "cpu",
        with_fishers: bool = True,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"expected a floating-point dtype, got {dtype}")
        matrices = 2 if with_fishers else 1
        if tile is None:
            cached = _BLOCK_BYTES // (matrices * max(capacity, 1) * dtype.itemsize)
            tile = min(max(cached // 64 * 64, 64), max(num_params, 1))
        for name, size in (("num_params", num_params), ("capacity", capacity), ("tile", tile)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.num_params = num_params
        self.capacity = capacity
        self.with_fishers = with_fishers
        self.tile = tile
        self._rows: dict[Hashable, int] = {}
        self.rejected: dict[Hashable, str] = {}
        self._arrived = 0
        tiles = -(-num_params // tile)
        self._data = torch.empty(tiles, capacity, matrices, tile, dtype=dtype, device=device)
        self._num_samples = torch.empty(capacity, dtype=torch.float64)
        self._squared_norm = torch.empty(capacity, dtype=torch.float64)
        self._fisher_min = torch.empty(capacity, dtype=torch.float64, device=device)
        self._fisher_max = torch.empty(capacity, dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"UpdateStore(num_params={self.num_params}, capacity={self.capacity}, dtype={self.dtype}): "
            f"{len(self)} clients, {len(self.rejected)} rejected"
        )

    @property
    def clients(self) -> tuple[Hashable, ...]:
        """Ids of the accepted clients in order of arrival: the rows of everything else."""
        return tuple(self._rows)

    @property
    def dtype(self) -> torch.dtype:
        """In which updates and Fishers are kept."""
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        """Where updates and Fishers are kept."""
        return self._data.device

    @property
    def nbytes(self) -> int:
        """Memory of updates and Fishers at full capacity."""
        return self._data.nbytes

    @property
    def updates(self) -> Tensor:
        """Tiled client matrix ``[T, K, L]`` of the accepted clients' updates; a view."""
        return self._data[:, : len(self), -1]

    @property
    def fishers(self) -> Tensor | None:
        """Tiled client matrix ``[T, K, L]`` of the accepted clients' Fishers; None in a store without."""
        return self._data[:, : len(self), 0] if self.with_fishers else None

    @property
    def num_samples(self) -> Tensor:
        """Sample counts of the accepted clients, float64 ``[K]``."""
        return self._num_samples[: len(self)]

    def clear(self) -> None:
        """Forget everything for the next round; the memory is kept."""
        self._rows = {}
        self.rejected = {}
        self._arrived = 0

    def reject(self, client_id: Hashable, reason: str) -> None:
        """Record that a client has no usable contribution this round, such as one that sent nothing."""
        if client_id in self._rows:
            raise ValueError(f"client {client_id!r} is already accepted")
        self.rejected[client_id] = reason

    def put(
        self,
        update: Tensor | NDArray[Any],
        fisher: Tensor | NDArray[Any] | None,
        num_samples: float | Tensor,
        client_id: Hashable | None = None,
    ) -> bool:
        """Copy one client's contribution into the store, if it can be used.

        Args:
            update: ``delta_k = w_k - w [P]``, any floating dtype.
            fisher: ``F_k [P]`` likewise; None for a store without Fishers.
            num_samples: ``n_k``.
            client_id: By default the number of earlier calls in this round.

        Returns:
            Whether it was accepted; if not, ``rejected`` tells why. A second contribution under an accepted
            id is not accepted, and the first one stays.

        Raises:
            RuntimeError: the store is full.
        """
        client = self._arrived if client_id is None else client_id
        self._arrived += 1
        if client in self._rows:
            self.rejected[client] = "sent a second contribution, which was ignored; the first one counts"
            return False
        if len(self) == self.capacity:
            raise RuntimeError(f"the store is full: its capacity is {self.capacity} clients")
        reason = self._fill_next_row(update, fisher, num_samples)
        if reason is not None:
            self.rejected[client] = reason
            return False
        self.rejected.pop(client, None)
        self._rows[client] = len(self)
        return True

    def client_updates(self) -> ClientUpdates:
        """The round so far, as rules see it."""
        K = len(self)
        return ClientUpdates(
            updates=self.updates,
            fishers=self.fishers,
            num_params=self.num_params,
            num_samples=self.num_samples,
            clients=self.clients,
            squared_norm=self._squared_norm[:K],
            fisher_min=self._fisher_min[:K] if self.with_fishers else None,
            fisher_max=self._fisher_max[:K] if self.with_fishers else None,
            valid=torch.ones(K, dtype=torch.bool),
            rejected=dict(self.rejected),
        )

    def _fill_next_row(self, update: Any, fisher: Any, num_samples: Any) -> str | None:
        """Write row ``K``, which is nobody's until its client is accepted; the reason if it cannot be."""
        K, P = len(self), self.num_params
        try:
            count = _number(num_samples)
            vectors = {-1: self._vector("update", update)}
            if self.with_fishers:
                vectors[0] = self._vector("Fisher", fisher)
        except (TypeError, ValueError) as error:
            return str(error)
        norm = ops.squared_norm(vectors[-1].view(1, 1, P), P).item()
        low = high = None
        if self.with_fishers:
            low, high = (bound.item() for bound in ops.importance_range(vectors[0].view(1, 1, P), P))
            self._fisher_min[K], self._fisher_max[K] = low, high
        reason = rejection_reason(count, norm, low, high)
        if reason is not None:
            return reason
        self._num_samples[K], self._squared_norm[K] = count, norm
        full = P // self.tile
        for matrix, vector in vectors.items():
            tiles = self._data[:, K, matrix]
            tiles[:full].copy_(vector[: full * self.tile].view(full, self.tile))
            tiles[-1, : P - full * self.tile].copy_(vector[full * self.tile :])
        return None

    def _vector(self, name: str, values: Any) -> Tensor:
        """The values as they will be kept, contiguous; a copy only where dtype, device or strides differ."""
        try:
            vector = as_tensor(values)
        except TypeError as error:
            raise TypeError(f"the {name} is no vector: {error}") from None
        if not vector.is_floating_point():
            raise TypeError(f"the {name} must be floating point, got {vector.dtype}")
        if tuple(vector.shape) != (self.num_params,):
            raise ValueError(f"the {name} must be a vector of {self.num_params} parameters, got {list(vector.shape)}")
        return vector.to(self.device, self.dtype).contiguous()


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"the sample count must be a number, got {value!r}") from None
