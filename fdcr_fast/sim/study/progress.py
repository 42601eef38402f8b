"""A study on the terminal: its progress, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fdcr_fast.sim.run.metrics import FINAL_ROUNDS
from fdcr_fast.sim.run.report import MEANINGS, figures_of
from fdcr_fast.sim.study.pool import StudyEvent, StudyProgress
from fdcr_fast.sim.study.results import StudyResults
from fdcr_fast.sim.study.spec import Run

# Measures that a line of a terminal has room for with their spread.
SHOWN = ("accuracy", "attack_success_rate", "true_positive_rate", "false_positive_rate")


def _size(run: Run) -> int:
    return run.config.rounds * run.config.cohort()


@contextmanager
def study_progress(console: Console, runs: Sequence[Run]) -> Iterator[StudyProgress]:
    """A bar that counts the trained clients of all runs, one for every run under way, and a line for each that ended.

    Args:
        console: Where to show it.
        runs: The runs that are going to be executed, each once.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
        total = bar.add_task("study", total=sum(map(_size, runs)), figures=f"0 of {len(runs)} runs")
        tasks: dict[str, TaskID] = {}
        trained: dict[str, int] = {}
        ended = 0

        def update(event: StudyEvent) -> None:
            nonlocal ended
            run, name = event.run, event.run.folder
            if event.ended:
                ended += 1
                trained[name] = _size(run)
                bar.remove_task(tasks.pop(name))
                bar.update(total, completed=sum(trained.values()), figures=f"{ended} of {len(runs)} runs")
                bar.console.print(
                    f"{run.label}: {event.error or 'finished'} ({name})", markup=False, highlight=False, soft_wrap=True
                )
            elif event.progress is None:
                tasks[name] = bar.add_task(run.label, total=_size(run), figures="")
            else:
                progress = event.progress
                trained[name] = (progress.round - 1) * run.config.cohort() + progress.clients_done
                bar.update(tasks[name], completed=trained[name])
                bar.update(total, completed=sum(trained.values()))
                if progress.record is not None:
                    bar.update(tasks[name], figures=figures_of(progress.record))

        yield update


def results_tables(results: StudyResults) -> Iterator[rich_table.Table]:
    """What has finished in each setting, in the measures that a terminal has room for."""
    for setting in results.study.settings:
        if any(done.run.setting == setting.name for done in results.finished):
            title = f"{setting.name or results.study.title}: mean of the last {FINAL_ROUNDS} rounds, in per cent"
            yield results.table(setting.name, SHOWN).to_rich(title, MEANINGS)
