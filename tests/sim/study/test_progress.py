"""What a terminal shows of a study: names and errors as they are, brackets and bars among them."""

from __future__ import annotations

import io

from rich.console import Console

from fdcr_fast.sim.run.report import Table
from fdcr_fast.sim.study import Study
from fdcr_fast.sim.study.pool import StudyEvent
from fdcr_fast.sim.study.progress import study_progress

NAME = "[/red] of [batch, 3]"


def console() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=True)


def shown(on: Console) -> str:
    file = on.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_progress_shows_brackets() -> None:
    study = Study.model_validate({"title": "brackets", "base": {}, "rows": [{"name": NAME}], "seeds": 1})
    runs, on = study.runs(None, {}), console()
    with study_progress(on, runs) as progress:
        progress(StudyEvent(runs[0]))
        progress(StudyEvent(runs[0], ended=True, error="ValueError: got [num_samples, 3]"))
    assert f"{NAME}, seed 0: ValueError: got [num_samples, 3] (" in shown(on)


def test_tables_show_brackets_and_bars() -> None:
    table, on = Table(["row", "[i]"], [[f"{NAME} | x", "1"]]), console()
    on.print(table.to_rich(NAME, NAME))
    assert shown(on).count(NAME) == 3
    assert "[i]" in shown(on)
    line = table.to_markdown().splitlines()[-1]
    assert line == rf"| {NAME} \| x | 1 |"
