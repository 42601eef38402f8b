"""What is measured: records per round and client, their summary, and the similarity of importances."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor

from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.tiles import Span

Phase = Literal["training", "fisher", "aggregation", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FINAL_ROUNDS = 5

Problem = Literal["diverged", "constant", "chance"]


def _undefined(value: object) -> object:
    return None if value == "" else value


OptionalFloat = Annotated[float | None, BeforeValidator(_undefined)]
OptionalProblem = Annotated[Problem | None, BeforeValidator(_undefined)]


class RoundRecord(BaseModel):
    """One row of rounds.csv. Shares are in [0, 1]; None (empty) means undefined.

    Attributes:
        round: Counted from 1.
        accuracy: ``A``, of the new global model on the clean test images.
        loss: Its mean cross-entropy on them; undefined where it is not finite.
        problem: What is wrong with it: ``diverged``, its parameters or its loss are not finite, or no upload of the
            round could be used (such as where none is finite); else ``constant``, it predicts one class for all test
            images; else ``chance``, it is no better than always predicting the most frequent class. See
            :func:`fdcr_fast.sim.evaluation.problem_of`. The shares say nothing of such a model.
        attack_success_rate: Share of the test images that the attack wants taken for the target class which are;
            for a trigger those of other classes, with it. See :meth:`fdcr_fast.sim.attacks.poison.Poisoning.victims`.
            Where nobody is malicious, how often the trigger alone does that.
        backdoor_failure_rate: ``R = 1 - attack_success_rate``.
        tradeoff: ``(A + R) / 2``.
        true_positive_rate: Share of the attackers that sent an upload which were excluded or rejected; undefined in
            rounds in which nobody attacks.
        false_positive_rate: Share of the benign clients that sent one which were excluded or rejected; undefined in the
            same rounds.
        exclusion_rate: Share of all clients that sent one which were excluded or rejected.
        participants: Clients drawn for the round.
        missing: Those who sent nothing: dropped out, too late, or failed.
        kept: Those whose upload counted.
        rejected: Those whose upload could not be used.
        seconds: Wall time since the end of the round before; for the first round of a run or of its resumption, since
            its beginning.
        training_seconds: Of the local training of all processes together, as are the next three of their phases.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    accuracy: float
    loss: OptionalFloat
    problem: OptionalProblem
    attack_success_rate: OptionalFloat
    backdoor_failure_rate: OptionalFloat
    tradeoff: OptionalFloat
    true_positive_rate: OptionalFloat
    false_positive_rate: OptionalFloat
    exclusion_rate: OptionalFloat
    participants: int
    missing: int
    kept: int
    rejected: int
    seconds: float
    training_seconds: float
    fisher_seconds: float
    aggregation_seconds: float
    evaluation_seconds: float
    peak_rss_bytes: int


class ClientRecord(BaseModel):
    """One row of clients.csv: what became of one client drawn for one round.

    Attributes:
        sent: Whether it sent an upload.
        discrepancy: ``V_k``; None if the rule computes none or the client was rejected.
        weight: Of its update in the new global model.
        reason: Why it sent nothing or was rejected, else empty. A client can be valid and yet not kept.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    client: int
    malicious: bool
    num_samples: int
    sent: bool
    discrepancy: OptionalFloat
    weight: float
    kept: bool
    reason: str


class Summary(BaseModel):
    """Contents of summary.json: means over the last five rounds (fewer if fewer ran) of what a round has.

    Attributes:
        problems: In how many of these rounds the global model had which problem; empty for a sound one.
        seconds: Wall time from the call to the writing of this, all calls of a run that was resumed together, but for
            rounds that were interrupted and have been done again.
        phase_seconds: Of all processes and all rounds, by phase.
        peak_rss_bytes: Largest resident memory of the process.
        rounds: How many there were.
        averaged_rounds: Over how many of them the means are.
        missing: Clients drawn who sent nothing, over all rounds.
        rejected: Uploads that could not be used, over all rounds.
    """

    model_config = ConfigDict(frozen=True)

    accuracy: float
    attack_success_rate: float | None
    backdoor_failure_rate: float | None
    tradeoff: float | None
    true_positive_rate: float | None
    false_positive_rate: float | None
    exclusion_rate: float | None
    problems: dict[Problem, int]
    seconds: float
    phase_seconds: dict[Phase, float]
    peak_rss_bytes: int
    rounds: int
    averaged_rounds: int
    missing: int
    rejected: int


def share(chosen: Collection[int], among: Collection[int]) -> float | None:
    """Share of ``among`` that is in ``chosen``; None if there is nobody."""
    return len(set(chosen) & set(among)) / len(among) if among else None


def match_rate(predicted: Tensor, expected: Tensor | int) -> float:
    """Share of one or more predictions that equal what is expected."""
    return (predicted == expected).double().mean().item()


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """Mean of what is not None; None if there is nothing."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def summarize(rounds: Sequence[RoundRecord]) -> Summary:
    """Final figures of a run.

    Raises:
        ValueError: no round.
    """
    if not rounds:
        raise ValueError("a summary needs at least one round")
    last = rounds[-FINAL_ROUNDS:]
    return Summary(
        accuracy=sum(record.accuracy for record in last) / len(last),
        attack_success_rate=mean_of_defined([record.attack_success_rate for record in last]),
        backdoor_failure_rate=mean_of_defined([record.backdoor_failure_rate for record in last]),
        tradeoff=mean_of_defined([record.tradeoff for record in last]),
        true_positive_rate=mean_of_defined([record.true_positive_rate for record in last]),
        false_positive_rate=mean_of_defined([record.false_positive_rate for record in last]),
        exclusion_rate=mean_of_defined([record.exclusion_rate for record in last]),
        problems=Counter(record.problem for record in last if record.problem is not None),
        seconds=sum(record.seconds for record in rounds),
        phase_seconds={phase: sum(getattr(record, f"{phase}_seconds") for record in rounds) for phase in PHASES},
        peak_rss_bytes=max(record.peak_rss_bytes for record in rounds),
        rounds=len(rounds),
        averaged_rounds=len(last),
        missing=sum(record.missing for record in rounds),
        rejected=sum(record.rejected for record in rounds),
    )


def importance_similarity(uploads: ClientUpdates, clients: Sequence[int]) -> Tensor:
    """Cosine similarity of the importance vectors of ``S`` clients (figure 1), float64 ``[S, S]``.

    Those without an upload have NaN.

    Raises:
        ValueError: there are no Fishers.
    """
    if uploads.fisher_min is None or uploads.fisher_max is None:
        raise ValueError("the uploads have no Fishers")
    row = {client: index for index, client in enumerate(uploads.clients)}
    present = [index for index, client in enumerate(clients) if client in row]
    rows = torch.tensor([row[clients[index]] for index in present], dtype=torch.int64)
    low, high = uploads.fisher_min[rows, None], uploads.fisher_max[rows, None]

    def read(span: Span, total: Tensor) -> Tensor:
        assert span.fishers is not None  # there are ranges of them
        for index, block in enumerate(span.fishers.unbind()):
            fishers = block[rows, : span.num_params - index * uploads.tiles.tile].double()
            importance = (fishers - low) / (high - low)
            total = total + importance @ importance.T
        return total

    gram = uploads.sum(torch.zeros(len(rows), len(rows), dtype=torch.float64), read)
    norms = gram.diagonal().sqrt()
    similarity = torch.full((len(clients), len(clients)), float("nan"), dtype=torch.float64)
    places = torch.tensor(present, dtype=torch.int64)
    similarity[places[:, None], places] = gram / (norms[:, None] * norms)
    return similarity


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class WallClock:
    """Wall time between events."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the clock was made."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class Stopwatch:
    """Seconds spent by phase."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time spent in the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
