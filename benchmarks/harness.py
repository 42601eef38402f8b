"""What all benchmarks share: a contender measured by pytest-benchmark, between rounds of its peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.machine import watched

_MOST_ROUNDS = 50
_ROUNDS_OF_A_TRIAL = 2  # under --benchmark-disable


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, one number per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Times) -> float:
        """Ratio of the medians."""
        return self.median / other.median

    def spread_over(self, other: Times) -> tuple[float, float]:
        """Quartiles of the ratios within the rounds: how much the ratio itself varied."""
        return self.ratios(other).quartiles

    def ratios(self, other: Times) -> Times:
        """The ratios within the rounds, in the place of seconds."""
        return Times(tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True)))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        low, high = self.quartiles
        return (high - low) / self.median


@dataclass(frozen=True)
class Comparison:
    """Times of all contenders by name, ours first, and why the machine counts as busy meanwhile, or nothing."""

    times: dict[str, Times]
    busy: str


@dataclass(frozen=True)
class Bench:
    """What a benchmark measures with, and who is told what it found.

    Attributes:
        fixture: Of pytest-benchmark.
        seconds: For the repeats of one comparison.
        fewest_rounds: Of one comparison, however long they take.
        refuse_busy: Whether to fail where the machine is busy.
        add: Takes a row of the benchmark's table: its key, its formatted cells, and the figures behind them.
    """

    fixture: BenchmarkFixture
    seconds: float
    fewest_rounds: int
    refuse_busy: bool
    add: Callable[[str, Mapping[str, str], Mapping[str, Any]], None]

    def compare(self, contenders: Mapping[str, Callable[[], Any]], share: float = 1.0) -> Comparison:
        """Runs A B C A B C ... for a share of the seconds, so that all contenders meet the same machine.

        The first is what pytest-benchmark reports; the others, its peers, go to its ``extra_info``.
        """
        ours, *peers = contenders
        warm_up = sum(map(_time, contenders.values()))
        seconds = share * self.seconds
        warm = sum(map(_time, contenders.values())) if warm_up < seconds / 4 else warm_up
        rounds = min(max(int(seconds / warm), self.fewest_rounds), _MOST_ROUNDS)
        with watched() as load:
            times = self._interleaved(contenders, rounds)
        busy = load.verdict(times[peers[0] if peers else ours].spread)
        self.fixture.extra_info |= {
            "ours": ours,
            "busy": busy,
            "peers": {
                peer: {
                    "median": times[peer].median,
                    "times_ours": times[peer].over(times[ours]),
                    "times_ours_quartiles": times[peer].spread_over(times[ours]),
                    "seconds": times[peer].seconds,
                }
                for peer in peers
            },
        }
        if busy and self.refuse_busy:
            pytest.fail(f"not recorded, the machine is busy: {busy}")
        return Comparison(times, busy)

    def _interleaved(self, contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
        ours, *peers = contenders
        seconds: dict[str, list[float]] = {name: [] for name in contenders}

        def time_peers() -> None:
            for peer in peers:
                seconds[peer].append(_time(contenders[peer]))

        def run() -> None:  # a result is freed within its time, as those of the peers are
            contenders[ours]()

        if self.fixture.disabled:
            for _ in range(_ROUNDS_OF_A_TRIAL):
                time_peers()
                seconds[ours].append(_time(run))
        else:
            self.fixture.pedantic(run, setup=time_peers, rounds=rounds)
            seconds[ours] += self.fixture.stats.stats.data
        return {name: Times(tuple(found)) for name, found in seconds.items()}


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
