"""Which page a folder gets."""

from __future__ import annotations

from pathlib import Path

from fdcr_fast.sim.page.parts import Page
from fdcr_fast.sim.page.run import run_page
from fdcr_fast.sim.page.study import study_page
from fdcr_fast.sim.run.folder import RunFolder, write_atomically
from fdcr_fast.sim.run.metrics import summarize
from fdcr_fast.sim.study.record import StudyRecord


def write_page(folder: Path, out: Path) -> Path:
    """Write the page of the run or of the study in a folder, finished or not, and return its path.

    Raises:
        ValueError: the folder holds neither, or nothing has been done yet.
    """
    page = _page(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.to_html().encode())
    return out


def _page(folder: Path) -> Page:
    if StudyRecord.recorded(folder):
        record = StudyRecord.read(folder)
        return study_page(record, record.results(folder))
    run = RunFolder(folder)
    if not run.config_path.exists():
        raise ValueError(
            f"{folder} holds neither a run (config.yaml) nor a study (study.json); the command that made a study with "
            "an earlier version writes study.json when it is given again"
        )
    state = run.read()
    if state is None:
        raise ValueError(f"{folder}: no round of the run has been done yet")
    summary = run.summary() if run.summary_path.exists() else summarize(state.rounds)
    return run_page(state.result(run.config(), summary), folder.resolve().name)
