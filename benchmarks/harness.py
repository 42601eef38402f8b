"""What all benchmarks share: interleaved repeats, medians, and tables that name the machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import torch

import fdcr_fast

RESULTS = Path(__file__).parent / "results"
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 50


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


def interleave(contenders: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Times]:
    """Runs A B C A B C ... for about so many seconds, so that all contenders meet the same machine."""
    warm_up = sum(_time(run) for run in contenders.values())
    warm = sum(_time(run) for run in contenders.values()) if warm_up < seconds / 4 else warm_up
    rounds = min(max(int(seconds / warm), _FEWEST_ROUNDS), _MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_time(run))
    return {name: Times(tuple(t)) for name, t in times.items()}


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    torch: str
    fdcr_fast: str
    kernels: str

    @classmethod
    def this(cls) -> Machine:
        return cls(
            cpu=_cpu_model(),
            cores=torch.multiprocessing.cpu_count(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            fdcr_fast=fdcr_fast.__version__,
            kernels=fdcr_fast.backends()["cpu"].reason,
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Report:
    """``results/<name>.json`` and the Markdown table made from it.

    A run replaces the rows that it measured and keeps the others, unless they are from another machine:
    every row is a comparison within one process, so rows need not be measured together.

    Args:
        closing: From the figures of all rows to what is said below the table; by default nothing.
    """

    folder: ClassVar[Path] = RESULTS

    def __init__(
        self,
        name: str,
        title: str,
        command: str,
        notes: str,
        closing: Callable[[Mapping[str, Any]], str] = lambda rows: "",
    ) -> None:
        self._name = name
        self._head = (title, command, notes)
        self._closing = closing

    @property
    def _file(self) -> Path:
        return self.folder / f"{self._name}.json"

    def closing(self) -> str:
        """What is said below the table; nothing where there is no table."""
        if not self._file.exists():
            return ""
        rows = json.loads(self._file.read_text())["rows"]
        return self._closing({key: row["figures"] for key, row in rows.items()})

    def add(self, key: str, cells: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        """One row: its formatted cells, and the figures behind them."""
        machine = asdict(Machine.this())
        saved = json.loads(self._file.read_text()) if self._file.exists() else {}
        rows = saved["rows"] if saved.get("machine") == machine else {}
        rows[key] = {"date": date.today().isoformat(), "cells": dict(cells), "figures": dict(figures)}
        self._file.parent.mkdir(exist_ok=True)
        self._file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        closing = self.closing()
        text = self._markdown(machine, rows) + (f"\n{closing}\n" if closing else "")
        self._file.with_suffix(".md").write_text(text)

    def _markdown(self, machine: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
        title, command, notes = self._head
        columns = list(dict.fromkeys(column for row in rows.values() for column in row["cells"]))
        table = [[row["cells"].get(column, "") for column in columns] for row in rows.values()]
        dates = sorted({row["date"] for row in rows.values()})
        return "\n\n".join(
            [
                f"# {title}",
                f"`{command}`, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}",
                "{cpu}, {cores} cores, {threads} threads; torch {torch}; fdcr_fast {fdcr_fast}, {kernels}.".format(
                    **machine
                ),
                notes,
                markdown_table(columns, table) + "\n",
            ]
        )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
