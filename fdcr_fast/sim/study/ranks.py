"""How the rules that looked on judged the attackers, over all runs of a study."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from fdcr_fast.sim.run.records import RankRecord, ScoreRecord
from fdcr_fast.sim.run.report import Table, percent
from fdcr_fast.sim.run.result import SimulationResult
from fdcr_fast.sim.study.spec import Run

Runs = Sequence[tuple[Run, SimulationResult]]

# The files of a study, by name: the records of all its runs.
TABLES: dict[str, type[BaseModel]] = {"ranks": RankRecord, "scores": ScoreRecord}

LEGEND = (
    "Round by round, of each rule that looked on: how many of all minorities it suspects more than the set of the "
    "attackers (0: none), or, of a rule that judges no sets, the area under the ROC curve of its scores (1: every "
    "attacker above every other client). ASR is that of the last round."
)


def records_csv(runs: Runs, name: str) -> str:
    """The records of a name in ``TABLES``, one line each, after the setting, the row and the seed."""
    columns = ["setting", "row", "seed", *TABLES[name].model_fields]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run, result in runs:
        place: dict[str, Any] = {"setting": run.setting, "row": run.row, "seed": run.config.seed}
        writer.writerows(place | record.model_dump() for record in getattr(result, name))
    return text.getvalue()


def ranks_table(runs: Runs) -> Table:
    """A line per run and rule that looked on, with what it said in some rounds."""
    rounds = _shown(max(len(result.rounds) for _, result in runs))
    lines = []
    for run, result in runs:
        by_rule: dict[str, dict[int, RankRecord]] = {}
        for record in result.ranks:
            by_rule.setdefault(record.rule, {})[record.round] = record
        for rule, records in by_rule.items():
            sets = max((record.sets or 0 for record in records.values()), default=0)
            figures = [_figure(records.get(round), bool(sets)) for round in rounds]
            success = percent(result.rounds[-1].attack_success_rate)
            what = f"rank of {sets}" if sets else "AUC"
            lines.append([run.row, str(run.config.seed), rule, success, what, *figures])
    return Table(["row", "seed", "rule", "ASR", "what", *map(str, rounds)], lines, texts=(0, 2, 4))


def _shown(last: int) -> list[int]:
    """The first four rounds, every fourth one, and the last."""
    return sorted({*range(1, min(4, last) + 1), *range(8, last + 1, 4), last})


def _figure(record: RankRecord | None, sets: bool) -> str:
    if record is None:
        return "-"
    value = record.set_rank if sets else record.area_under_curve
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
