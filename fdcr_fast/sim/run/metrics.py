"""What is measured of a round, and what a run gives.

A new metric of a round is a function here in ``METRICS`` and a field of the same name, with a default, of
:class:`RoundRecord` and of :class:`Summary`; a row of ``MEASURES`` for each figure of a run that tables are to show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fdcr_fast.sim.costs import PHASES, Phase, peak_rss_bytes
from fdcr_fast.sim.run.evaluation import Evaluation
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord, Summary

FINAL_ROUNDS = 5


@dataclass(frozen=True)
class Round:
    """A finished round, with the truth that no server is told.

    Attributes:
        evaluation: How good the new global model is.
        clients: One record for each client drawn.
        attackers: Who attacked in it and sent an upload.
    """

    evaluation: Evaluation
    clients: Sequence[ClientRecord]
    attackers: frozenset[int]

    @cached_property
    def sent(self) -> list[ClientRecord]:
        """The records of the clients that sent an upload."""
        return [record for record in self.clients if record.sent]

    @cached_property
    def excluded(self) -> list[int]:
        """Those of them who were excluded or rejected."""
        return [record.client for record in self.sent if not record.kept]

    @cached_property
    def rejected(self) -> int:
        """Number of uploads that could not be used."""
        return sum(bool(record.reason) for record in self.sent)


def share(chosen: Collection[int], among: Collection[int]) -> float | None:
    """Share of ``among`` that is in ``chosen``; None if there is nobody."""
    return len(set(chosen) & set(among)) / len(among) if among else None


def backdoor_failure_rate(round: Round) -> float | None:
    """``R = 1 - attack success rate``."""
    success = round.evaluation.attack_success_rate
    return None if success is None else 1 - success


def tradeoff(round: Round) -> float | None:
    """``(A + R) / 2``."""
    success = round.evaluation.attack_success_rate
    return None if success is None else (round.evaluation.accuracy + 1 - success) / 2


def true_positive_rate(round: Round) -> float | None:
    """Share of the attackers who were excluded or rejected."""
    return share(round.excluded, round.attackers)


def false_positive_rate(round: Round) -> float | None:
    """Share of the benign clients who were excluded or rejected, where somebody attacks."""
    benign = [record.client for record in round.sent if not record.malicious]
    return share(round.excluded, benign) if round.attackers else None


def exclusion_rate(round: Round) -> float | None:
    """Share of all clients who were excluded or rejected."""
    return share(round.excluded, [record.client for record in round.sent])


# Figures of a round of which a run has the mean over the last rounds.
METRICS: dict[str, Callable[[Round], float | None]] = {
    "accuracy": lambda round: round.evaluation.accuracy,
    "attack_success_rate": lambda round: round.evaluation.attack_success_rate,
    "backdoor_failure_rate": backdoor_failure_rate,
    "tradeoff": tradeoff,
    "true_positive_rate": true_positive_rate,
    "false_positive_rate": false_positive_rate,
    "exclusion_rate": exclusion_rate,
}


def round_record(number: int, round: Round, seconds: float, phase_seconds: Mapping[Phase, float]) -> RoundRecord:
    """The record of a round that took so long, by the wall and by phase."""
    nobody_usable = bool(round.sent) and round.rejected == len(round.sent)
    return RoundRecord.model_validate(
        {
            "round": number,
            "loss": round.evaluation.loss,
            "problem": "diverged" if nobody_usable else round.evaluation.problem,
            "participants": len(round.clients),
            "missing": len(round.clients) - len(round.sent),
            "kept": len(round.sent) - len(round.excluded),
            "rejected": round.rejected,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            **{name: metric(round) for name, metric in METRICS.items()},
            **{f"{phase}_seconds": spent for phase, spent in phase_seconds.items()},
        }
    )


Values = Sequence[float | None]


def mean(values: Values) -> float | None:
    """Mean of what is not None; None if there is nothing."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def mean_of_last(values: Values) -> float | None:
    """Mean over the last rounds."""
    return mean(values[-FINAL_ROUNDS:])


def largest_of_last(values: Values) -> float | None:
    """Largest value of the last rounds."""
    return max((value for value in values[-FINAL_ROUNDS:] if value is not None), default=None)


class Measure(NamedTuple):
    """A figure of a run.

    Attributes:
        heading: What tables call it.
        metric: The figure of every round that it is taken from.
        over: What it makes of the values of all rounds.
    """

    heading: str
    metric: str
    over: Callable[[Values], float | None] = mean_of_last

    def __call__(self, rounds: Sequence[RoundRecord]) -> float | None:
        """The figure; None where it is undefined."""
        return self.over([getattr(record, self.metric) for record in rounds])


# By name, in the order of the columns of a study.
MEASURES = {
    "accuracy": Measure("A", "accuracy"),
    "attack_success_rate": Measure("ASR", "attack_success_rate"),
    "max_attack_success_rate": Measure("max ASR", "attack_success_rate", largest_of_last),
    "backdoor_failure_rate": Measure("R", "backdoor_failure_rate"),
    "tradeoff": Measure("(A+R)/2", "tradeoff"),
    "true_positive_rate": Measure("TPR", "true_positive_rate"),
    "false_positive_rate": Measure("FPR", "false_positive_rate"),
    "true_positive_rate_all_rounds": Measure("TPR, all rounds", "true_positive_rate", mean),
    "false_positive_rate_all_rounds": Measure("FPR, all rounds", "false_positive_rate", mean),
    "exclusion_rate": Measure("excluded", "exclusion_rate"),
    "exclusion_rate_all_rounds": Measure("excluded, all rounds", "exclusion_rate", mean),
}


def summarize(rounds: Sequence[RoundRecord]) -> Summary:
    """Final figures of a run.

    Raises:
        ValueError: no round.
    """
    if not rounds:
        raise ValueError("a summary needs at least one round")
    last = rounds[-FINAL_ROUNDS:]
    return Summary.model_validate(
        {
            **{name: mean_of_last([getattr(record, name) for record in rounds]) for name in METRICS},
            "problems": Counter(record.problem for record in last if record.problem is not None),
            "seconds": sum(record.seconds for record in rounds),
            "phase_seconds": {phase: sum(getattr(record, f"{phase}_seconds") for record in rounds) for phase in PHASES},
            "peak_rss_bytes": max(record.peak_rss_bytes for record in rounds),
            "rounds": len(rounds),
            "averaged_rounds": len(last),
            "missing": sum(record.missing for record in rounds),
            "rejected": sum(record.rejected for record in rounds),
        }
    )
