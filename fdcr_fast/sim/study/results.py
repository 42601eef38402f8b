"""What a study gave: one line per run in CSV, mean and spread over the seeds in Markdown, figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.folder import write_atomically
from fdcr_fast.sim.run.metrics import FINAL_ROUNDS, MEASURES
from fdcr_fast.sim.run.report import DEAD_MODELS, Table, model_state, problem_lines
from fdcr_fast.sim.run.result import SimulationResult
from fdcr_fast.sim.study import ranks
from fdcr_fast.sim.study.folder import Origin, StudyRunFolder
from fdcr_fast.sim.study.spec import Row, Run, Study

LEGEND = (
    f"In per cent, mean and sample standard deviation over the seeds; of each run the mean of the last {FINAL_ROUNDS} "
    "rounds, for max ASR their maximum. A accuracy, ASR attack success rate, R = 100 - ASR, TPR and FPR malicious and "
    "benign clients excluded, of rounds in which somebody attacks; excluded: clients of either kind, of any round."
)


@dataclass(frozen=True)
class FinishedRun:
    """A run with its result."""

    run: Run
    result: SimulationResult
    origin: Origin

    @cached_property
    def measures(self) -> dict[str, float | None]:
        """The figures of ``MEASURES``, by name."""
        return {name: measure(self.result.rounds) for name, measure in MEASURES.items()}


@dataclass(frozen=True)
class StudyResults:
    """Everything that the folders of a study's runs say.

    Attributes:
        study: What was asked for.
        runs: All its runs, finished or not.
        finished: The runs with a result, in the order of ``runs``.
        errors: Why others failed, by name of the run's folder.
    """

    study: Study
    runs: tuple[Run, ...]
    finished: tuple[FinishedRun, ...]
    errors: dict[str, str]

    @classmethod
    def read(
        cls, study: Study, runs: Sequence[Run], runs_folder: Path, before: StudyResults | None = None
    ) -> StudyResults:
        """Collect what there is; what was read ``before`` is not read again.

        Raises:
            ValueError: a run of the same name was made with other fields.
        """
        known = {} if before is None else {done.run: done for done in before.finished}
        finished, errors = [], {}
        for run in runs:
            folder = StudyRunFolder(runs_folder / run.folder)
            if run in known:
                finished.append(known[run])
            elif folder.finished:
                finished.append(FinishedRun(run, folder.result(run.config), folder.origin()))
            elif folder.error is not None:
                errors[run.folder] = folder.error
        return cls(study, tuple(runs), tuple(finished), errors)

    @property
    def dead(self) -> list[FinishedRun]:
        """The finished runs whose global model had a problem in one of the last rounds."""
        return [done for done in self.finished if done.result.summary.problems]

    @property
    def watched(self) -> ranks.Runs:
        """The finished runs in which rules looked on, with their results."""
        return [(done.run, done.result) for done in self.finished if done.result.ranks]

    def seeds(self, setting: str, row: str) -> list[FinishedRun]:
        """The finished runs of one row in one setting."""
        return [done for done in self.finished if (done.run.setting, done.run.row) == (setting, row)]

    def percents(self, setting: str, row: str, measure: str) -> list[float]:
        """A figure of ``MEASURES`` of each of them in per cent, where it is defined."""
        values = [done.measures[measure] for done in self.seeds(setting, row)]
        return [100 * value for value in values if value is not None]

    def write(self, out: Path, command: str) -> None:
        """Write results.csv and results.md, which tells the command that made them.

        Where rules looked on, ranks.csv and scores.csv have what they said.
        """
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "results.csv", self.to_csv().encode())
        write_atomically(out / "results.md", self.to_markdown(command).encode())
        if self.watched:
            for name in ranks.TABLES:
                write_atomically(out / f"{name}.csv", ranks.records_csv(self.watched, name).encode())

    def to_csv(self) -> str:
        """One line per run that has finished or failed; shares in [0, 1], an empty cell where undefined.

        Columns: setting, row, the fields that differ between the runs, the seed, ``MEASURES``, the state of
        the global model, seconds of wall time, machine, date, the run's folder, the error.
        """
        dumps = [run.config.model_dump(mode="json") for run in self.runs]
        varying = [
            name
            for name in SimulationConfig.model_fields
            if name != "seed" and any(dump[name] != dumps[0][name] for dump in dumps)
        ]
        columns = ["setting", "row", *varying, "seed", *MEASURES]
        columns += ["global_model", "seconds", "machine", "date", "folder", "error"]
        done = {finished.run: finished for finished in self.finished}
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for run, dump in zip(self.runs, dumps, strict=True):
            line: dict[str, Any] = {"setting": run.setting, "row": run.row, "folder": run.folder, "seed": dump["seed"]}
            line |= {name: dump[name] for name in varying}
            if run in done:
                summary, origin = done[run].result.summary, done[run].origin
                line |= done[run].measures
                line |= {"global_model": model_state(summary), "seconds": round(summary.seconds, 3)}
                line |= {"machine": origin.machine, "date": origin.date}
            elif run.folder in self.errors:
                line["error"] = self.errors[run.folder]
            else:
                continue
            writer.writerow(line)
        return text.getvalue()

    def to_markdown(self, command: str) -> str:
        """A table for every setting that was run, one line per row of the study."""
        parts = [f"# {self.study.title}", self.study.note.strip(), f"`{command}`", self.provenance, LEGEND]
        known = {done.run for done in self.finished} | {run for run in self.runs if run.folder in self.errors}
        tried = {run.setting for run in known}
        for setting in self.study.settings:
            if setting.name in tried:
                parts += [f"## {setting.name}" if setting.name else "", self.table(setting.name).to_markdown()]
        if self.watched:
            parts += ["## Rules that looked on", ranks.LEGEND]
            for name in dict.fromkeys(run.setting for run, _ in self.watched):
                of_setting = [(run, result) for run, result in self.watched if run.setting == name]
                parts += [f"**{name}**" if name else "", ranks.ranks_table(of_setting).to_markdown()]
        untried = [setting.name for setting in self.study.settings if setting.name and setting.name not in tried]
        if untried:
            parts.append(f"Not run yet: {'; '.join(untried)}.")
        if self.dead:
            lines = [f"- {line}" for done in self.dead for line in problem_lines(done.run.label, done.result.summary)]
            parts += ["## Dead models", DEAD_MODELS, "\n".join(lines)]
        if self.errors:
            lines = [
                f"- {run.label}: {self.errors[run.folder]} (`{run.folder}`)"
                for run in self.runs
                if run.folder in self.errors
            ]
            parts += ["## Failed runs", "\n".join(lines)]
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def provenance(self) -> str:
        """How many runs have finished, and when, where and with what they were made."""
        if not self.finished:
            return "No run has finished yet."
        origins = [done.origin for done in self.finished]
        days = sorted({origin.date[:10] for origin in origins})
        made = " and ".join(sorted({f"fdcr_fast {o.fdcr_fast}, torch {o.torch}, {o.machine}" for o in origins}))
        seconds = statistics.mean(done.result.summary.seconds for done in self.finished)
        return (
            f"{len(self.finished)} of {len(self.runs)} runs have finished, {seconds:.0f} s each on average. "
            f"{made}; {' to '.join(dict.fromkeys([days[0], days[-1]]))}."
        )

    def table(self, setting: str, measures: Collection[str] = tuple(MEASURES)) -> Table:
        """A line per row of the study: figures of ``MEASURES`` in one setting, and what the paper reports."""
        index = [each.name for each in self.study.settings].index(setting)
        reported = any(row.paper for row in self.study.rows)
        headings = ["row", "seeds", *(MEASURES[name].heading for name in measures)]
        headings += ["paper A", "paper R", "paper (A+R)/2"] if reported else []
        lines = []
        for row in self.study.rows:
            cells = [_mean_and_spread(self.percents(setting, row.name, name)) for name in measures]
            seeds = str(len(self.seeds(setting, row.name)))
            lines.append([row.name, seeds, *cells, *(_reported(row, index) if reported else [])])
        return Table(headings, lines)


def _mean_and_spread(percents: Sequence[float]) -> str:
    if not percents:
        return "-"
    mean = f"{statistics.mean(percents):.1f}"
    return mean if len(percents) < 2 else f"{mean} ± {statistics.stdev(percents):.1f}"


def _reported(row: Row, index: int) -> list[str]:
    figures = row.paper[index] if row.paper else None
    if figures is None:
        return ["-", "-", "-"]
    accuracy, failure = figures
    return [f"{accuracy:.1f}", f"{failure:.1f}", f"{(accuracy + failure) / 2:.1f}"]
