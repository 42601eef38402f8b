"""The page of a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import yaml

from fdcr_fast.sim.page.parts import Page, Picture, Section
from fdcr_fast.sim.page.run import dropped_sections
from fdcr_fast.sim.run.metrics import MEASURES
from fdcr_fast.sim.run.report import COMPARED, DEAD_MODELS, Table, model_state, percent, problem_lines
from fdcr_fast.sim.study import ranks
from fdcr_fast.sim.study.figures import figures_of
from fdcr_fast.sim.study.record import StudyRecord
from fdcr_fast.sim.study.results import LEGEND, StudyResults


def study_page(record: StudyRecord, results: StudyResults) -> Page:
    """The page of a study, of which not all runs need have finished."""
    study = results.study
    failed = [run for run in results.runs if run.folder in results.errors]
    notices = [line for done in results.dead for line in problem_lines(done.run.label, done.result.summary)]
    notices = [*notices, *([DEAD_MODELS] if notices else [])]
    if len(results.finished) < len(results.runs):
        notices.append(f"The study has not finished: {len(results.finished)} of {len(results.runs)} runs are done.")
    notices += [f"{run.label} failed: {results.errors[run.folder]}" for run in failed]
    begun = {done.run.setting for done in results.finished}
    settings = [setting.name for setting in study.settings if setting.name in begun]
    pictures = [Picture(figure, f"{name}: the tables have the numbers.") for name, figure in figures_of(results)]
    return Page(
        study.title,
        [line for line in (study.note.strip(), record.command, results.provenance) if line],
        notices,
        [
            Section("Result", text=LEGEND, tables=[(name or "All rows", results.table(name)) for name in settings]),
            *([Section("Figures", pictures=pictures)] if pictures else []),
            *_ranks(results),
            Section("Runs", folded=True, tables=[("In per cent, of the last rounds", _runs(results))]),
            *_dropped(results),
            Section("Configuration", code=yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False)),
        ],
    )


def _ranks(results: StudyResults) -> Iterator[Section]:
    if results.watched:
        yield Section(
            "Rules that looked on", text=ranks.LEGEND, tables=[("By round", ranks.ranks_table(results.watched))]
        )


def _runs(results: StudyResults) -> Table:
    lines = [
        [
            done.run.setting,
            done.run.row,
            str(done.run.config.seed),
            *(percent(done.measures[name]) for name in COMPARED),
            f"{done.result.summary.seconds:.1f}",
            model_state(done.result.summary),
            done.run.folder,
        ]
        for done in results.finished
    ]
    headings = ["setting", "row", "seed", *(MEASURES[name].heading for name in COMPARED), "seconds", "model", "folder"]
    return Table(headings, lines, texts=(0, 1, len(headings) - 2, len(headings) - 1))


def _dropped(results: StudyResults) -> Iterator[Section]:
    """Who was dropped when and why, in the first seed of each row in each setting."""
    yield Section(
        "Clients",
        text="Of the first seed of each row. The command fdcr-fast report makes a page of any single run's folder.",
    )
    for setting in results.study.settings:
        for row in results.study.rows:
            for done in results.seeds(setting.name, row.name)[:1]:
                for section in dropped_sections(done.result, level=3):
                    yield replace(section, heading=f"{done.run.label}: {section.heading.lower()}")
