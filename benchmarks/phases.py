"""Where the time of a round goes: methods of the library, wrapped from outside while a round is watched."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fdcr_fast
from fdcr_fast import FDCR, UpdateStore, ops
from fdcr_fast.round import columns, readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules import base
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.coalition import rule as coalition_rule
from fdcr_fast.rules.pairwise import flame
from fdcr_fast.rules.pairwise import gram as pairwise_gram

RULE_CLASSES = {x for x in vars(fdcr_fast).values() if isinstance(x, type) and issubclass(x, AggregationRule)}
RULE_METHODS = (("decide", "judge"), ("weigh", "weights"), ("combine", "combine"), ("combine", "of_mean"))

# A phase is what these take, without what they call of other phases.
POINTS: tuple[tuple[str, Any, str], ...] = (
    ("take in", AggregationRule, "_take_in"),
    ("Fisher ranges", ops, "importance_range"),
    ("norms", readings, "measured"),
    ("guess", readings, "sampled_scores"),
    ("screen", ClientUpdates, "screened"),
    ("one reading", readings, "scores_and_mean"),
    ("one reading", readings, "norms_and_mean"),
    ("scores", readings, "scores"),
    ("mean", readings, "mean"),
    ("Gram", pairwise_gram, "_grams"),
    ("sums over parameters", columns, "column_sums"),
    ("sums over parameters", readings, "moments"),
    ("search", coalition_rule, "find_coalition"),
    ("noise", flame, "with_noise"),
    ("central mean", readings, "central_mean"),
    ("decide", FDCR, "decide"),
    *((phase, rule, name) for phase, name in RULE_METHODS for rule in RULE_CLASSES if name in vars(rule)),
    ("result", base, "warn_of_states"),
    ("result", UpdateStore, "end_round"),
    ("result", base, "result_of"),
)
REST = "the rest"


def phases(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median seconds of each phase that occurred, the longest first."""
    watched = [_watched(run) for _ in range(repeats)]
    names = dict.fromkeys(name for seconds in watched for name in seconds)
    medians = {name: statistics.median(seconds.get(name, 0.0) for seconds in watched) for name in names}
    return dict(sorted(medians.items(), key=lambda phase: -phase[1]))


def shares(seconds: Mapping[str, float]) -> str:
    """``one reading 90 %, guess 8 %``: the phases that take a hundredth of the round or more."""
    total = sum(seconds.values())
    return ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in seconds.items() if s >= 0.01 * total)


def _watched(run: Callable[[], Any]) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    nested = [0.0]  # of every call under way, the seconds that belong to other phases

    def timed(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nested.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                seconds[phase] += whole - nested.pop()
                nested[-1] += whole

        return wrapper

    with _wrapped(timed):
        timed(REST, run)()
    return dict(seconds)


@contextmanager
def _wrapped(timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    originals = [(owner, name, vars(owner)[name]) for _, owner, name in POINTS]
    for (phase, owner, name), (*_, original) in zip(POINTS, originals, strict=True):
        setattr(owner, name, timed(phase, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
