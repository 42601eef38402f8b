"""Who takes part in a store's round, in which rows, and when the round ends."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from collections.abc import Hashable, Iterable
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.screening import OnInvalid, refuse
from fdcr_fast.store.rows import Accepted, Rows, check_flags

_NUMBERS = attrgetter("num_samples", "squared_norm", "fisher_min", "fisher_max")
_CLIENT, _ROW = attrgetter("client"), attrgetter("row")


class Arrival(NamedTuple):
    """A client whose contribution is being copied, and the row that is kept free for it."""

    client: Hashable
    row: int


class Attendance:
    """The clients of a round, each of which arrives, and is then accepted or rejected; safe to use from many threads.

    When a round has ended everything stays as it was, until a client of the next round comes.

    Args:
        rows: Rows of the contributions.
        accepted: The clients that are there already, by id.
        ended: Whether their round has ended.
        on_invalid: Whether a contribution that is rejected raises as well.
        cleared: Whether only :meth:`clear` begins the next round.

    Attributes:
        lock: Lock to hold while several things are looked at that must belong together.
        accepted: The accepted clients, by id.
        rejected: Reason by client id of those that were not accepted.
    """

    def __init__(
        self,
        rows: Rows,
        accepted: dict[Hashable, Accepted],
        ended: bool,
        on_invalid: OnInvalid,
        cleared: bool = False,
    ) -> None:
        check_flags(cleared=cleared)
        self._rows = rows
        self._on_invalid = on_invalid
        self._cleared = cleared
        self.lock = threading.Condition()
        self.accepted = accepted
        self.rejected: dict[Hashable, str] = {}
        self._arriving: set[Hashable] = set()
        self._free = self._rows_of_nobody()
        self._arrived = 0
        self._aggregated = frozenset(accepted) if ended else None  # the clients of a round that has ended

    @property
    def ended(self) -> bool:
        """Whether the round has ended, so that the next contribution begins another one."""
        return self._aggregated is not None

    def settle(self) -> None:
        """Wait, with the lock held, until nobody is arriving; the lock is given up meanwhile."""
        while self._arriving:
            self.lock.wait()

    def enter(self, client: Hashable | None, row: int | None, replace: bool) -> Arrival | None:
        """Let a client arrive, who must then be accepted or leave; None where it was rejected.

        Args:
            client: Its id; None for the number of earlier arrivals, or the next one that is no client's.
            row: Row for its contribution; None for the first free one.
            replace: Whether it may take the place of what it sent before.

        Raises:
            RuntimeError: all rows are taken.
            ValueError: the given row is not free; or the client was rejected, and that raises.
        """
        with self.lock:
            self._begin_round()
            client = self._next_id() if client is None else client
            self._arrived += 1
            if client in self._arriving or (client in self.accepted and not replace):
                self._refuse(client, "sent a second contribution, which was ignored; the first one counts")
                return None
            if not self._free:
                raise RuntimeError(f"the store is full: its capacity is {self._rows.shape.capacity} clients")
            row = self._free.take(row)
            self._arriving.add(client)
            return Arrival(client, row)

    def leave(self, arrival: Arrival, reason: str | None = None) -> None:
        """Let a client go that has arrived and cannot be accepted; rejected where it is to blame, with a reason.

        Raises:
            ValueError: the client was rejected, and that raises.
        """
        with self.lock:
            self._arriving.discard(arrival.client)
            self._free.release(arrival.row)
            self.lock.notify_all()
            if reason is not None:
                self._refuse(arrival.client, reason)

    def accept(self, accepted: Accepted) -> None:
        """Accept a client that has arrived, whose row now holds its contribution, instead of an earlier one."""
        with self.lock:
            self._arriving.discard(accepted.client)
            self.lock.notify_all()
            self.rejected.pop(accepted.client, None)
            earlier = self.accepted.pop(accepted.client, None)
            self.accepted[accepted.client] = accepted
            if earlier is not None:
                self._release(earlier.row)

    def admit(self, accepted: Accepted) -> None:
        """Accept a client without arrival, whose row was filled elsewhere.

        Raises:
            ValueError: it is accepted already, or its row is not free.
        """
        with self.lock:
            self._begin_round()
            self._check_new(accepted.client)
            self._free.take(accepted.row)
            self._rows.commit(accepted)
            self.accepted[accepted.client] = accepted
            self.rejected.pop(accepted.client, None)

    def reject(self, client: Hashable, reason: str) -> None:
        """Reject a client that has sent nothing that could be used.

        Raises:
            ValueError: it is accepted already.
        """
        with self.lock:
            self._begin_round()
            self._check_new(client)
            self.rejected[client] = reason

    def remove(self, client: Hashable) -> None:
        """Make an accepted client's row free again.

        Raises:
            KeyError: it is not accepted.
        """
        with self.lock:
            if client not in self.accepted:
                raise KeyError(f"client {client!r} is not in the store")
            self._release(self.accepted.pop(client).row)

    def in_order(self) -> list[Accepted]:
        """The accepted clients by row, the last ones in the gaps that others have left, when nobody is arriving."""
        with self.lock:
            self.settle()
            return self._packed()

    def client_updates(self) -> ClientUpdates:
        """The round so far, as rules see it, when nobody is arriving."""
        with self.lock:
            self.settle()
            clients = self._packed()
            rows = list(map(_ROW, clients))
            tiles, ranges = self._rows.tiles(rows), self._rows.ranges(rows)
            rejected = dict(self.rejected)
        numbers = np.array(list(map(_NUMBERS, clients)), dtype=np.float64).reshape(-1, 4)
        num_samples, squared_norm, low, high = map(torch.from_numpy, numbers.T)
        low, high = (low, high) if ranges is None else ranges
        with_fishers = self._rows.shape.with_fishers
        return ClientUpdates(
            tiles=tiles,
            num_samples=num_samples,
            clients=tuple(map(_CLIENT, clients)),
            squared_norm=squared_norm,
            fisher_min=low if with_fishers else None,
            fisher_max=high if with_fishers else None,
            valid=torch.ones(len(clients), dtype=torch.bool),
            rejected=rejected,
            num_params=self._rows.shape.num_params,
            unread=self._rows.unread and bool(clients),
        )

    def end(self, clients: Iterable[Hashable]) -> None:
        """End the round of these clients; whoever else is accepted belongs to the next one."""
        with self.lock:
            self._mark(frozenset(clients))

    def clear(self) -> None:
        """Forget everybody, when nobody is arriving."""
        with self.lock:
            self.settle()
            self._next_round({})

    def _packed(self) -> list[Accepted]:
        clients = sorted(self.accepted.values(), key=_ROW)
        if clients and clients[-1].row >= len(clients):  # the last ones go into the gaps
            by_row, last = {client.row: client for client in clients}, clients
            clients = [by_row[k] if k in by_row else last.pop() for k in range(len(by_row))]
        rows = list(map(_ROW, clients))
        packed = self._rows.pack(rows)
        if packed != rows:
            clients = [dataclasses.replace(client, row=row) for client, row in zip(clients, packed, strict=True)]
            self.accepted = {client.client: client for client in clients}
            self._free = FreeRows(range(len(clients), self._rows.shape.capacity))
        return clients

    def _begin_round(self) -> None:
        """Forget the last round if it has ended.

        Raises:
            RuntimeError: only :meth:`clear` does.
        """
        if not self.ended:
            return
        if self._cleared:
            raise RuntimeError("the round was aggregated: clear begins the next one")
        self.settle()
        if self._aggregated is not None:  # else another client has begun the next round meanwhile
            self._next_round({client: c for client, c in self.accepted.items() if client not in self._aggregated})

    def _next_round(self, late: dict[Hashable, Accepted]) -> None:
        """Forget all but those who were too late for the last round."""
        self._rows.forget([accepted.row for client, accepted in self.accepted.items() if client not in late])
        self.accepted, self._arrived, self.rejected = late, len(late), {}
        self._free = self._rows_of_nobody()
        self._mark(None)

    def _mark(self, aggregated: frozenset[Hashable] | None) -> None:
        if (aggregated is None) != (self._aggregated is None):
            self._rows.mark_round(aggregated is not None)
        self._aggregated = aggregated

    def _next_id(self) -> int:
        taken = (self.accepted, self._arriving, self.rejected)
        return next(number for number in itertools.count(self._arrived) if not any(number in ids for ids in taken))

    def _check_new(self, client: Hashable) -> None:
        if client in self.accepted:
            raise ValueError(f"client {client!r} is already accepted")

    def _refuse(self, client: Hashable, reason: str) -> None:
        self.rejected[client] = reason
        refuse({client: reason}, self._on_invalid)

    def _rows_of_nobody(self) -> FreeRows:
        taken = {accepted.row for accepted in self.accepted.values()}
        return FreeRows(row for row in range(self._rows.shape.capacity) if row not in taken)

    def _release(self, row: int) -> None:
        self._rows.forget([row])
        self._free.release(row)


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
