"""What the commands of the command line do; their flags are declared in :mod:`fdcr_fast.cli`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import fdcr_fast
from fdcr_fast.self_test import self_test
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.ranks import torchrun_group
from fdcr_fast.sim.page.write import write_page
from fdcr_fast.sim.run.ending import clear_ending, command_line, resume_command
from fdcr_fast.sim.run.folder import RunFolder
from fdcr_fast.sim.run.records import Summary
from fdcr_fast.sim.run.report import DEAD_MODELS, cost_line, problem_lines, progress_bar, summary_table
from fdcr_fast.sim.run.result import Progress
from fdcr_fast.sim.run.simulation import resume, simulate
from fdcr_fast.sim.study import Study, check, execute, pending, select
from fdcr_fast.sim.study.figures import write_figures
from fdcr_fast.sim.study.pool import StudyEvent
from fdcr_fast.sim.study.progress import results_tables, study_progress
from fdcr_fast.sim.study.record import StudyRecord
from fdcr_fast.sim.study.results import StudyResults

_RARELY = 20.0  # tables of thousands of runs take seconds: no more than so small a part of a study's time

# The setting of docs/studies/digits.yaml.
DEMO = Study.model_validate(
    {
        "title": "A backdoor on digits: ten clients, three of them malicious",
        "note": "FedAvg does not defend, and the oracle is told who is malicious.",
        "base": {
            "beta": 0.5,
            "malicious": 0.3,
            "rounds": 15,
            "local_epochs": 5,
            "lr": 0.05,
            "trigger": "0:0,0:1,1:0,1:1",
        },
        "rows": [
            {"name": "FedAvg", "server": "fedavg"},
            {"name": "FLAME", "server": "flame"},
            {"name": "FDCR", "server": "fdcr"},
            {"name": "CoalitionFDCR", "server": "coalition-fdcr"},
            {"name": "oracle", "server": "oracle"},
        ],
        "seeds": 1,
        "figures": ["attack-success"],
    }
)


def show_info(tested: bool) -> None:
    """Print what is installed, and the outcome of its test if that is wanted."""
    click.echo(fdcr_fast.info())
    if tested and not self_test(click.echo):
        raise click.exceptions.Exit(1)


def run_simulation(config: Path | None, out: Path | None, resumed: Path | None, overrides: Mapping[str, Any]) -> None:
    """Run a federation of settings that can be, or resume one, and print how well it was defended."""
    with clear_ending(lambda: resume_command(out or resumed)):
        if resumed is not None:
            settings = RunFolder(resumed).config()
            run = partial(resume, resumed)
        else:
            settings = SimulationConfig.from_yaml(config.read_text() if config else "", overrides)
            run = partial(simulate, settings, out)
        with torchrun_group() as group:
            first = group is None or group.rank() == 0
            with _progress(settings.server, settings) if first else nullcontext() as progress:
                result = run(progress, group)
    if not first:
        return
    console = Console()
    console.print(summary_table(settings.server, result.summary))
    console.print(cost_line(result.summary))
    if out or resumed:
        console.print(f"Results and figures are in {out or resumed}", markup=False)
    _warn(settings.server, result.summary)


def _warn(name: str, summary: Summary) -> None:
    """Say what is wrong with a run's global model, whatever its figures are."""
    for line in problem_lines(name, summary):
        click.echo(f"Warning: {line}. {DEAD_MODELS}", err=True)


def _progress(name: str, config: SimulationConfig) -> AbstractContextManager[Progress]:
    return progress_bar(Console(stderr=True), name, config.rounds, config.cohort())


def run_study(
    file: Path, out: Path, seeds: int | None, data_dir: Path | None, scale: str | None, options: Mapping[str, Any]
) -> None:
    """Run all rows of a study; ``options`` are those of :func:`_execute`."""
    command = f"fdcr-fast study {file.name} --out DIR" + (f" --scale {scale}" if scale else "")
    with clear_ending(_same_command):
        study = Study.from_yaml(file.read_text())
        record = StudyRecord.of(study, command, "runs", scale=scale, seeds=seeds, data_dir=data_dir)
        _execute(record, out, **options)


def rerun(
    name: str, scale: str, leak: bool, out: Path, seeds: int | None, data_dir: Path | None, options: Mapping[str, Any]
) -> None:
    """Rerun a table or figure of the paper; ``options`` are those of :func:`_execute`."""
    command = f"fdcr-fast reproduce {name} --scale {scale} --data-dir DIR" + (" --leak" if leak else "")
    overrides = {"attacker_fisher": "random"} if leak else {}
    with clear_ending(_same_command):
        study = Study.shipped(name)
        record = StudyRecord.of(
            study, command, "../runs", scale=scale, seeds=seeds, data_dir=data_dir, overrides=overrides
        )
        _execute(record, out / (f"{name}-{scale}-leak" if leak else f"{name}-{scale}"), **options)


def run_demo(out: Path, seeds: int, workers: int | None) -> None:
    """Run the demo, and say what there is to see."""
    with clear_ending(_same_command):
        _execute(StudyRecord.of(DEMO, "fdcr-fast demo", "runs", seeds=seeds), out, workers=workers)
    click.echo(
        "oracle: a baseline that is told who is malicious. One seed is one seed: of five, CoalitionFDCR loses none\n"
        "and FDCR four (--seeds 5, docs/results/digits).\n"
        f"The figure: {out / 'attack-success.png'}, and .svg for slides."
    )


def make_report(folder: Path, out: Path | None) -> None:
    """Make the page of a run or of a study."""
    with clear_ending(lambda: "The page was not written."):
        click.echo(f"The report is {write_page(folder, out or folder / 'report.html')}")


def _same_command() -> str:
    command = command_line(*click.get_current_context().find_root().obj)
    return f"Finished runs are kept, others resume from their last round with the same command: {command}"


def _execute(
    record: StudyRecord,
    out: Path,
    *,
    rows: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    workers: int | None = None,
) -> None:
    """Execute what has no result yet, and write the results of all there is, now and then and in the end."""
    runs, runs_folder = record.runs(), out / record.runs_folder
    chosen = pending(select(runs, rows, settings), runs_folder)
    check(chosen)
    record.write(out)
    results, due = record.results(out), 0.0
    results.write(out, record.command)

    def write() -> None:
        nonlocal results, due
        began = time.monotonic()
        results = StudyResults.read(record.study, runs, runs_folder, results)
        results.write(out, record.command)
        now = time.monotonic()
        due = now + _RARELY * (now - began)

    with study_progress(Console(stderr=True), chosen) as progress:

        def tell(event: StudyEvent) -> None:
            progress(event)
            if event.ended and time.monotonic() >= due:
                write()

        try:
            execute(chosen, runs_folder, workers, tell)
        finally:
            write()
    write_figures(results, out)
    console = Console()
    for table in results_tables(results):
        console.print(table)
    click.echo(
        f"{len(results.finished)} of {len(runs)} runs have finished; results.md, results.csv and figures are in {out}\n"
        f"All on one page: {write_page(out, out / 'report.html')}"
    )
    if results.dead:
        click.echo(f"Warning: {len(results.dead)} of them have a dead global model: see results.md", err=True)
    failed = [run for run in chosen if run.folder in results.errors]
    if failed:
        raise click.ClickException(f"{len(failed)} runs failed: see results.md; the same command tries them again")
