"""What a run says while it goes on, where it stands, and what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.records import ClientRecord, RankRecord, RoundRecord, ScoreRecord, Summary
from fdcr_fast.sim.training.base import NO_BUFFERS

MOST_COMPARED = 200  # clients whose similarity is kept, which takes time and memory for all pairs


@dataclass(frozen=True)
class ProgressEvent:
    """Sent after every client (``record`` is None) and after every round.

    Attributes:
        round: The round under way or just finished, counted from 1.
        clients_done: Number of its clients that are done.
        record: The finished round's figures.
    """

    round: int
    clients_done: int
    record: RoundRecord | None = None


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class SimulationResult:
    """Outcome of a run.

    Attributes:
        config: What was run.
        params: Final global parameters, float32 ``[P]``.
        rounds: One record per round.
        clients: One record per round and client drawn for it.
        similarity: Cosine similarity of the importances of the last round's clients, in the order of their records and
            at most ``MOST_COMPARED`` of them, float64 ``[S, S]``; None where they compute no Fishers.
        summary: Means over the last five rounds.
        scores: How the rules that look on judged each client, in every round.
        ranks: How they judged the attackers.
        buffers: Final buffers of the global model, float64 ``[B]``, in the order of its state dict; empty for a model
            without.
    """

    config: SimulationConfig
    params: Tensor
    rounds: tuple[RoundRecord, ...]
    clients: tuple[ClientRecord, ...]
    similarity: Tensor | None
    summary: Summary
    scores: tuple[ScoreRecord, ...] = ()
    ranks: tuple[RankRecord, ...] = ()
    buffers: Tensor = NO_BUFFERS


@dataclass
class RunState:
    """Where a run stands between two rounds.

    Attributes:
        params: Global parameters ``[P]``.
        rounds: Records of every finished round.
        clients: Records of every client in every finished round.
        last_update: What the last round changed in the parameters, ``[P]``; None before the first.
        similarity: Similarity of the clients' importances, ``[S, S]``; after the last round only.
        memory: What the server remembers of its clients, empty for one that remembers nothing.
        scores: What the rules that look on said of each client in every finished round.
        ranks: What they said of the attackers.
        watched: What each of these rules remembers, by name.
        buffers: Buffers of the global model, float64 ``[B]``; None where there are none, and before the first round.
    """

    params: Tensor
    rounds: list[RoundRecord]
    clients: list[ClientRecord]
    last_update: Tensor | None = None
    similarity: Tensor | None = None
    memory: bytes = b""
    scores: list[ScoreRecord] = field(default_factory=list)
    ranks: list[RankRecord] = field(default_factory=list)
    watched: dict[str, bytes] = field(default_factory=dict)
    buffers: Tensor | None = None

    def result(self, config: SimulationConfig, summary: Summary) -> SimulationResult:
        """The outcome of a run that stands here at its end."""
        return SimulationResult(
            config,
            self.params,
            tuple(self.rounds),
            tuple(self.clients),
            self.similarity,
            summary,
            tuple(self.scores),
            tuple(self.ranks),
            NO_BUFFERS if self.buffers is None else self.buffers,
        )
