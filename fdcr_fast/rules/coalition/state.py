"""What the server remembers of its clients from earlier rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdcr_fast.rules.coalition.search import Views

_FORMAT = "fdcr_fast.CoalitionState 2"
_AGREEMENT_DECAY = 0.5  # it tells most once the model has learned without a client, and must not lag behind

_AGREEMENT = ("agreement", "excess", "agreed")  # not in states of before
_BY_CLIENT = ("concentration", *_AGREEMENT, "seen")

ClientId = str | int


@dataclass(repr=False, eq=False)
class CoalitionState:
    """Sums of the views over rounds, by client and by pair of clients that took part together.

    A round that lies ``t`` rounds back counts ``decay^t``. Memory is ``2 M^2`` numbers for the ``M`` clients that are
    remembered; beyond ``max_clients`` those that were away longest are forgotten.

    Attributes:
        clients: ``M`` ids, strings or integers.
        similarity: Sums of ``std(A)``, float64 ``[M, M]``.
        together: Sums of the rounds that two clients took part in together, float64 ``[M, M]``; on the diagonal a
            client's own.
        concentration: Sums of ``c``, float64 ``[M]``.
        agreement: Sums of the cosines of updates and model, of which a round that lies ``t`` rounds back counts
            ``0.5^t``, float64 ``[M]``.
        excess: Sums, in the same way, of the kurtosis of the features above the median client's, float64 ``[M]``.
        agreed: Sums of the rounds that are in them, float64 ``[M]``.
        seen: The last round of each client, int64 ``[M]``.
        rounds: How many there were.
        num_params: ``P`` of the model that they were about; None where that is not known yet.
    """

    clients: list[ClientId] = field(default_factory=list)
    similarity: Tensor = field(default_factory=lambda: _zeros(0, 0))
    together: Tensor = field(default_factory=lambda: _zeros(0, 0))
    concentration: Tensor = field(default_factory=lambda: _zeros(0))
    agreement: Tensor = field(default_factory=lambda: _zeros(0))
    excess: Tensor = field(default_factory=lambda: _zeros(0))
    agreed: Tensor = field(default_factory=lambda: _zeros(0))
    seen: Tensor = field(default_factory=lambda: _zeros(0).long())
    rounds: int = 0
    num_params: int | None = None

    def __repr__(self) -> str:
        return f"CoalitionState(rounds={self.rounds}, clients={len(self.clients)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoalitionState) and self.to_json() == other.to_json()

    def clear(self) -> None:
        """Forget everything, as before another experiment."""
        vars(self).update(vars(CoalitionState()))

    def check_model(self, num_params: int) -> None:
        """Raise ValueError where what is remembered is about a model of another size."""
        if self.num_params not in (None, num_params):
            raise ValueError(
                f"the rule remembers {self.rounds} rounds of a model with {self.num_params} parameters, and this one "
                f"has {num_params}: reset() forgets them"
            )
        self.num_params = num_params

    def remember(
        self, clients: Sequence[ClientId], views: Views, *, decay: float = 1.0, max_clients: int | None = None
    ) -> Views:
        """Add a round's views, and return the means over all rounds so far; 0 for pairs that never met before.

        Args:
            clients: Clients of the round.
            views: Views of the round.
            decay: In (0, 1], what an earlier round counts beside this one.
            max_clients: Most that are remembered, or those of this round if these are more; None for all.
        """
        self.rounds += 1
        if max_clients is not None:
            self._make_room(clients, max_clients)
        for sums in (self.similarity, self.together, self.concentration):
            sums *= decay
        rows = self._rows(clients)
        block = (rows[:, None], rows)
        self.similarity[block] += views.similarity
        self.concentration[rows] += views.concentration
        self.together[block] += 1
        self.seen[rows] = self.rounds
        return self.means(clients)

    def agree(self, clients: Sequence[ClientId], agreement: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
        """Add what the updates of the round that was remembered last tell of each client, and return the means.

        Args:
            clients: Clients of that round.
            agreement: Cosines of update and model, float64 ``[K]``.
            excess: Kurtosis above that of the median client, float64 ``[K]``.
        """
        rows = self._rows(clients)
        for sums, new in ((self.agreement, agreement), (self.excess, excess), (self.agreed, 1)):
            sums *= _AGREEMENT_DECAY
            sums[rows] += new
        agreed = self.agreed[rows]
        return self.agreement[rows] / agreed, self.excess[rows] / agreed

    def means(self, clients: Sequence[ClientId]) -> Views:
        """The means over all rounds so far of clients who took part in the last one.

        Raises:
            KeyError: one is not remembered.
        """
        known = self._known()
        rows = torch.tensor([known[client] for client in clients], dtype=torch.int64)
        block = (rows[:, None], rows)
        met = self.together[block]
        return Views(self.similarity[block] / met, self.concentration[rows] / met.diagonal())

    def forget(self, clients: Iterable[ClientId]) -> None:
        """Drop clients, such as those who left, and everything known of them; unknown ones are ignored."""
        gone = set(clients)
        rows = torch.tensor([i for i, client in enumerate(self.clients) if client not in gone], dtype=torch.int64)
        block = (rows[:, None], rows)
        self.clients = [client for client in self.clients if client not in gone]
        self.similarity, self.together = self.similarity[block], self.together[block]
        for name in _BY_CLIENT:
            setattr(self, name, getattr(self, name)[rows])

    def to_json(self) -> str:
        """The state as text; exact, to be read by :meth:`from_json`."""
        lower = torch.tril_indices(len(self.clients), len(self.clients)).unbind()
        pairs = {name: getattr(self, name)[lower].tolist() for name in ("similarity", "together")}
        return json.dumps(
            {
                "format": _FORMAT,
                "rounds": self.rounds,
                "num_params": self.num_params,
                "clients": self.clients,
                "seen": self.seen.tolist(),
                **pairs,
                **{name: getattr(self, name).tolist() for name in ("concentration", *_AGREEMENT)},
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> CoalitionState:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not such a state.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a coalition state: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"expected a coalition state of format {_FORMAT!r}")
        clients = data.get("clients")
        if not isinstance(clients, list) or not all(type(c) in (str, int) for c in clients):
            raise ValueError("the clients of a coalition state are strings or integers")
        M = len(clients)
        if len(set(clients)) != M:
            raise ValueError("a coalition state names a client twice")
        rounds = data.get("rounds")
        if type(rounds) is not int or rounds < 0:
            raise ValueError(f"the rounds of a coalition state are a count, got {rounds!r}")
        num_params = data.get("num_params")  # not in states of before
        if num_params is not None and (type(num_params) is not int or num_params < 1):
            raise ValueError(f"the num_params of a coalition state are a count, got {num_params!r}")
        lower = torch.tril_indices(M, M).unbind()
        matrices = {}
        for name in ("similarity", "together"):
            below = _zeros(M, M)
            below[lower] = _numbers(data, name, M * (M + 1) // 2)
            matrices[name] = below + below.tril(-1).T
        data = {**dict.fromkeys(_AGREEMENT, [0.0] * M), **data}
        vectors = {name: _numbers(data, name, M) for name in _BY_CLIENT}
        vectors["seen"] = vectors["seen"].long()
        return cls(clients, **matrices, **vectors, rounds=rounds, num_params=num_params)

    def _make_room(self, clients: Sequence[ClientId], max_clients: int) -> None:
        """Forget who was away longest, so that no more than ``max_clients`` are known once these are added."""
        here = set(clients)
        away = [row for row, client in enumerate(self.clients) if client not in here]
        excess = len(away) + len(here) - max(max_clients, len(here))
        if excess > 0:
            longest = self.seen[away].argsort(stable=True)[:excess].tolist()
            self.forget(self.clients[away[i]] for i in longest)

    def _known(self) -> dict[ClientId, int]:
        return {client: row for row, client in enumerate(self.clients)}

    def _rows(self, clients: Sequence[ClientId]) -> Tensor:
        """Rows of the clients, new ones appended."""
        for client in clients:
            if type(client) not in (str, int):
                raise ValueError(f"the ids of clients to remember are strings or integers, got {client!r}")
        known = self._known()
        new = [client for client in clients if client not in known]
        if new:
            self.clients = [*self.clients, *new]
            known = self._known()
            grow = (0, len(new), 0, len(new))
            pad = torch.nn.functional.pad
            self.similarity, self.together = pad(self.similarity, grow), pad(self.together, grow)
            for name in _BY_CLIENT:
                setattr(self, name, pad(getattr(self, name), grow[:2]))
        return torch.tensor([known[client] for client in clients], dtype=torch.int64)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _numbers(data: dict[str, object], name: str, size: int) -> Tensor:
    values = data.get(name)
    if (
        not isinstance(values, list)
        or len(values) != size
        or not all(type(x) in (int, float) and math.isfinite(x) for x in values)
    ):
        raise ValueError(f"expected {name} of a coalition state to be {size} finite numbers")
    return torch.tensor(values, dtype=torch.float64)
