"""Clients who push in one direction over the rounds count less."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.memory import empty
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import column_blocks
from fdcr_fast.round.shares import limited_shares
from fdcr_fast.round.tiles import MatrixTiles
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.pairwise.comparison import cosines
from fdcr_fast.rules.pairwise.gram import gram
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import of_all, valid_ids

_FORMAT = "fdcr_fast.FoolsGoldState 1"
_MOST = torch.finfo(torch.float32).max

ClientId = str | int


@dataclass(repr=False, eq=False)
class FoolsGoldState:
    """Sums of the clients' updates over rounds; memory is ``M P'`` numbers, :meth:`forget` those who left.

    Attributes:
        clients: ``M`` ids, strings or integers.
        history: ``sum_t delta_k^t`` over the parameters that are compared, float32 ``[M, P']``.
    """

    clients: list[ClientId] = field(default_factory=list)
    history: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __repr__(self) -> str:
        return f"FoolsGoldState(clients={len(self.clients)}, params={self.history.shape[1]})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FoolsGoldState):
            return False
        return self.clients == other.clients and torch.equal(self.history, other.history)

    def clear(self) -> None:
        """Forget everything, as before another experiment."""
        vars(self).update(vars(FoolsGoldState()))

    def add(self, clients: ClientUpdates, params: slice) -> ClientUpdates:
        """Add a round's valid clients, and return the histories as a round, in which those clients are valid."""
        ids: list[ClientId] = []
        for client in valid_ids(clients):
            if type(client) not in (str, int):
                raise ValueError(f"the ids of clients to remember are strings or integers, got {client!r}")
            ids.append(client)
        first, stop, _ = params.indices(clients.num_params)
        if self.clients and self.history.shape[1] != stop - first:
            raise ValueError(
                f"the state compares {self.history.shape[1]} parameters, the round has {stop - first}: "
                "reset() forgets the earlier rounds"
            )
        earlier = set(self.clients)
        new = [client for client in ids if client not in earlier]
        if new:
            self._make_room(new, stop - first)
        row = {client: i for i, client in enumerate(self.clients)}
        numbers = [row[client] for client in ids]
        begin, end, rows = numbers[0], numbers[0] + len(numbers), torch.tensor(numbers)
        side_by_side = numbers == list(range(begin, end))
        chosen = slice(begin, end) if side_by_side else rows
        for columns, updates in column_blocks(clients):
            low, high = max(columns.start, first), min(columns.stop, stop)
            if low < high:
                sums = self.history[chosen, low - first : high - first]
                sums.add_(updates[:, low - columns.start : high - columns.start].cpu())
                sums.clamp_(-_MOST, _MOST)  # stays finite
                if not side_by_side:  # a copy of them
                    self.history[chosen, low - first : high - first] = sums
        here = torch.zeros(len(self.clients), dtype=torch.bool)
        here[rows] = True
        counts = torch.ones(len(here), dtype=torch.float64)
        tiles, everybody = MatrixTiles.of(self.history, None), torch.ones_like(here)
        known = ClientUpdates(tiles, counts, tuple(self.clients), counts, None, None, everybody, {}, tiles.num_params)
        return known.with_valid(here)

    def _make_room(self, new: list[ClientId], num_params: int) -> None:
        """Take in clients with a history of zeros."""
        history = empty((len(self.clients) + len(new), num_params), torch.float32, lasting=True)
        history[: len(self.clients)] = self.history.reshape(-1, num_params)
        history[len(self.clients) :] = 0
        self.clients, self.history = [*self.clients, *new], history

    def forget(self, clients: Iterable[ClientId]) -> None:
        """Drop clients, such as those who left, and everything known of them; unknown ones are ignored."""
        gone = set(clients)
        rows = torch.tensor([i for i, client in enumerate(self.clients) if client not in gone], dtype=torch.int64)
        self.clients = [self.clients[i] for i in rows.tolist()]
        self.history = self.history[rows]

    def to_bytes(self) -> bytes:
        """The state as a NumPy archive without pickle, to be read by :meth:`from_bytes`."""
        buffer = io.BytesIO()
        header = json.dumps({"format": _FORMAT, "clients": self.clients})
        np.savez(buffer, header=np.array(header), history=self.history.numpy())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> FoolsGoldState:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: it is not such a state.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header, history = json.loads(str(arrays["header"])), torch.from_numpy(arrays["history"])
        except Exception as error:  # NumPy raises many kinds for bytes that are no archive
            raise ValueError(f"not a FoolsGold state: {error}") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise ValueError(f"expected a FoolsGold state of format {_FORMAT!r}")
        clients = header.get("clients")
        if not isinstance(clients, list) or not all(type(client) in (str, int) for client in clients):
            raise ValueError("the clients of a FoolsGold state are strings or integers")
        if len(set(clients)) != len(clients):
            raise ValueError("a FoolsGold state names a client twice")
        if history.dtype != torch.float32 or history.dim() != 2 or len(history) != len(clients):
            raise ValueError(
                f"expected a history of float32 [{len(clients)}, P], got {history.dtype} {list(history.shape)}"
            )
        if not history.isfinite().all():
            raise ValueError("the history of a FoolsGold state is not finite")
        return cls(clients, history)


@dataclass(frozen=True, kw_only=True)
class FoolsGold(AggregationRule):
    """Clients whose updates point in one direction over the rounds lose their weight (Fung et al., "The Limitations of
    Federated Learning in Sybil Settings", RAID 2020).

    With ``c_ij`` the cosine of the sums of all updates of two clients so far, and ``v_i = max(0, max_j c_ij)``: where
    ``v_j > v_i``, ``c_ij`` is reduced by ``v_i / v_j`` (pardoning); ``a_i = 1 - max(0, max_j c_ij)``, divided by the
    largest, at most 0.99 below 1; and the weight is ``logit(a_i) + 0.5``, kept in [0, 1]. As in the authors' code the
    largest weight is always 1. There the updates are summed with these weights, here averaged (the weights add up to
    1), because they are whole rounds of training and not gradients; features are not weighted. ``discrepancy`` holds
    the largest cosine after pardoning. A client alone is kept; where all agree completely, nobody is.

    The rule remembers earlier rounds in ``state``, which every call of ``aggregate`` updates.

    Args:
        params: Range of the parameters that are compared, by default all. (The paper recommends the output layer's.)
        state: State of earlier rounds, such as ``FoolsGoldState.from_bytes(data)``.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    weighs_samples = False
    params: slice = field(default_factory=lambda: slice(None))
    state: FoolsGoldState = field(default_factory=FoolsGoldState, hash=False)
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if self.params.step not in (None, 1):
            raise ValueError(f"params must be a slice without a step, got {self.params}")

    def reset(self) -> None:
        """Forget earlier rounds."""
        self.state.clear()

    def memory(self) -> bytes:
        """The state in its own format."""
        return self.state.to_bytes()

    def with_memory(self, memory: bytes) -> FoolsGold:
        """The rule with the state of another one."""
        return replace(self, state=FoolsGoldState.from_bytes(memory))

    def select(self, clients: ClientUpdates) -> Selection:
        """Add the round to the history, and weigh the clients by it."""
        histories = self.state.add(clients, self.params)
        row = {client: i for i, client in enumerate(histories.clients)}
        rows = torch.tensor([row[client] for client in valid_ids(clients)])
        gram_of_all = gram(histories, precision="float64").cpu()
        weight, cosine = foolsgold_weights(cosines(gram_of_all[rows][:, rows]))
        weight = limited_shares(weight / weight.sum().clamp(min=1e-300), self.max_weight_share)
        return Selection(of_all(clients, weight > 0), of_all(clients, cosine), weights=of_all(clients, weight))


def foolsgold_weights(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in [0, 1] and the largest cosines after pardoning, from the cosines ``[n, n]`` of the histories."""
    cosine = cosine.clone().fill_diagonal_(0)
    largest = cosine.amax(1)
    pardon = torch.where(largest > largest[:, None], largest[:, None] / largest, 1.0)
    largest = (cosine * pardon).amax(1)
    a = (1 - largest).clamp(0, 1)
    if not a.any():
        return a, largest
    a = a / a.max()
    a[a == 1] = 0.99
    return (torch.log(a / (1 - a)) + 0.5).clamp_(0, 1), largest
