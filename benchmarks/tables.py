"""Tables of what was measured: shown row by row, and kept in files where one asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fdcr_fast
from benchmarks.machine import Machine

RESULTS = Path(__file__).parent / "results"

Rows = dict[str, dict[str, Any]]  # by key: date, versions, cells and figures


def _says_nothing(rows: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Report:
    """What the tables of one benchmark are about.

    Attributes:
        name: Of its files, ``<name>.json`` and the ``<name>.md`` made from it.
        title: Heading.
        command: What measures it.
        notes: What the columns mean.
        closing: From the figures of all rows of a machine to what is said below them; by default nothing.
    """

    name: str
    title: str
    command: str
    notes: str
    closing: Callable[[Mapping[str, Any]], str] = _says_nothing


class Tables:
    """The rows of one run of the benchmarks.

    In the files, a row replaces the one of the same key and machine, and all others stay: every row is a comparison
    within one process, so rows need not be measured together.

    Args:
        folder: Of the files; None keeps nothing.
        say: Shows a line at once.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._measured: dict[Report, Rows] = {}

    def add(self, report: Report, key: str, cells: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        """One row: its formatted cells, and the figures behind them."""
        row = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "fdcr_fast": fdcr_fast.__version__,
            "cells": dict(cells),
            "figures": dict(figures),
        }
        self._say(", ".join(f"{column} {cell}".strip() for column, cell in cells.items() if cell))
        self._measured.setdefault(report, {})[key] = row
        if self._folder is not None:
            self._keep(self._folder, report, key, row)

    def close(self) -> None:
        """Say what the rows of this run amount to."""
        for report, rows in self._measured.items():
            self._say(_closing(report, rows))

    @staticmethod
    def _keep(folder: Path, report: Report, key: str, row: Mapping[str, Any]) -> None:
        file = folder / f"{report.name}.json"
        tables = json.loads(file.read_text()) if file.exists() else []
        machine = asdict(Machine.this())
        table = next((table for table in tables if table["machine"] == machine), None)
        if table is None:
            tables.append(table := {"machine": machine, "rows": {}})
        table["rows"][key] = row
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tables, indent=1) + "\n")
        file.with_suffix(".md").write_text(_markdown(report, tables))


def _closing(report: Report, rows: Rows) -> str:
    return report.closing({key: row["figures"] for key, row in rows.items()})


def _markdown(report: Report, tables: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"# {report.title}", f"`{report.command}`", report.notes]
    for table in tables:
        rows = table["rows"]
        columns = list(dict.fromkeys(column for row in rows.values() for column in row["cells"]))
        lines = [[row["cells"].get(column, "") for column in columns] for row in rows.values()]
        versions = (f"{name} {_from_to(row[name] for row in rows.values())}" for name in ("torch", "fdcr_fast"))
        days = _from_to(row["date"] for row in rows.values())
        parts += [f"{Machine(**table['machine'])}; {', '.join(versions)}; {days}."]
        parts += [markdown_table(columns, lines), _closing(report, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _from_to(values: Iterable[str]) -> str:
    found = sorted(set(values))
    return " to ".join(dict.fromkeys([found[0], found[-1]]))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
