"""What is measured: records per round and client, their summary, and the similarity of importances."""

from __future__ import annotations

import resource
import sys
import time
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


def _undefined(value: object) -> object:
    return None if value == "" else value


OptionalFloat = Annotated[float | None, BeforeValidator(_undefined)]


class RoundRecord(BaseModel):
    """One row of rounds.csv. Shares are in [0, 1]; None (empty) means undefined.

    Attributes:
        round: Counted from 1.
        accuracy: ``A``, of the new global model on the clean test images.
        attack_success_rate: Share of the test images that the attack wants taken for the target class which are;
            for a trigger those of other classes, with it. See :meth:`fdcr_fast.sim.attacks.poison.Poisoning.victims`.
        backdoor_failure_rate: ``R = 1 - attack_success_rate``.
        tradeoff: ``(A + R) / 2``.
        true_positive_rate: Share of the malicious clients that sent an upload which were excluded or rejected;
            undefined in rounds in which they do not attack.
        false_positive_rate: Share of the benign clients that sent one which were excluded or rejected.
        participants: Clients drawn for the round.
        missing: Those who sent nothing: dropped out, too late, or failed.
        kept: Those whose upload counted.
        rejected: Those whose upload could not be used.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    accuracy: float
    attack_success_rate: OptionalFloat
    backdoor_failure_rate: OptionalFloat
    tradeoff: OptionalFloat
    true_positive_rate: OptionalFloat
    false_positive_rate: OptionalFloat
    participants: int
    missing: int
    kept: int
    rejected: int
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
    """Contents of summary.json: means over the last five rounds (fewer if fewer ran), seconds in total."""

    model_config = ConfigDict(frozen=True)

    accuracy: float
    attack_success_rate: float | None
    backdoor_failure_rate: float | None
    tradeoff: float | None
    true_positive_rate: float | None
    false_positive_rate: float | None
    seconds: dict[Phase, float]
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
        seconds={phase: sum(getattr(record, f"{phase}_seconds") for record in rounds) for phase in PHASES},
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
