"""The command line. Flags of ``simulate`` are the fields of :class:`fdcr_fast.sim.SimulationConfig`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from rich.console import Console

import fdcr_fast
from fdcr_fast.self_test import self_test
from fdcr_fast.sim.attacks.poison import PAPER_TRIGGER
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.ranks import torchrun_group
from fdcr_fast.sim.notation import OneOf
from fdcr_fast.sim.page.write import write_page
from fdcr_fast.sim.run.ending import Commands, clear_ending, resume_command
from fdcr_fast.sim.run.folder import RunFolder
from fdcr_fast.sim.run.records import Summary
from fdcr_fast.sim.run.report import DEAD_MODELS, cost_line, problem_lines, progress_bar, summary_table
from fdcr_fast.sim.run.result import Progress
from fdcr_fast.sim.run.simulation import resume, simulate
from fdcr_fast.sim.study import SCALES, Study, check, execute, pending, select, shipped_studies
from fdcr_fast.sim.study.figures import write_figures
from fdcr_fast.sim.study.pool import StudyEvent
from fdcr_fast.sim.study.progress import results_tables, study_progress
from fdcr_fast.sim.study.record import StudyRecord
from fdcr_fast.sim.study.results import StudyResults

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


def _choices(annotation: Any) -> list[str]:
    """The names among a type's values."""
    if isinstance(annotation, OneOf):
        return list(annotation.choices)
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def config_option(name: str, field: FieldInfo) -> click.Option:
    """The flag of one field. Values stay text: the configuration alone decides what is valid."""
    flag = f"--{name.replace('_', '-')}"
    default = "paper" if field.default == PAPER_TRIGGER else field.default
    text = f"{field.description} [default: {default}]" if default is not None else field.description
    if isinstance(default, bool):
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    names = [choice for part in (*field.metadata, field.annotation) for choice in _choices(part)]
    return click.Option([flag], help=text, metavar="|".join(names) or "VALUE")


@click.group(cls=Commands, invoke_without_command=True)
@click.version_option(fdcr_fast.__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """FDCR backdoor defence for federated learning."""
    if context.invoked_subcommand is None:
        click.echo(fdcr_fast.info())
        click.echo("\nfdcr-fast --help lists the commands.")


@cli.command()
@click.option("--self-test", "tested", is_flag=True, help="Compare what is installed with plain PyTorch: ten seconds.")
def info(tested: bool) -> None:
    """Show version, PyTorch, threads, and which backends are usable or why not."""
    click.echo(fdcr_fast.info())
    if tested and not self_test(click.echo):
        raise click.exceptions.Exit(1)


def _warn(name: str, summary: Summary) -> None:
    """Say what is wrong with a run's global model, whatever its figures are."""
    for line in problem_lines(name, summary):
        click.echo(f"Warning: {line}. {DEAD_MODELS}", err=True)


def _progress(name: str, config: SimulationConfig) -> AbstractContextManager[Progress]:
    return progress_bar(Console(stderr=True), name, config.rounds, config.cohort())


@cli.command("simulate")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file of settings.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="New folder for results and figures.")
@click.option(
    "--resume",
    "resumed",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Continue the run in this folder, as its config.yaml says.",
)
def simulate_command(config: Path | None, out: Path | None, resumed: Path | None, **flags: str | bool | None) -> None:
    """Run a federation with malicious clients and report how well the server defends it.

    A YAML file given by --config holds any of the settings below, with underscores; flags override it. Under torchrun
    the processes run it together: torchrun --nproc-per-node 2 -m fdcr_fast simulate ...
    """
    overrides = {name: value for name, value in flags.items() if value is not None}
    with clear_ending(lambda: resume_command(out or resumed)):
        if resumed is not None:
            if config or out or overrides:
                raise click.UsageError("--resume takes every setting from its folder and goes with no other flag")
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


simulate_command.params += [config_option(name, field) for name, field in SimulationConfig.model_fields.items()]


def _same_command() -> str:
    command = click.get_current_context().find_root().obj
    return f"Finished runs are kept, others resume from their last round with the same command: {command}"


F = TypeVar("F", bound=Callable[..., None])


def _study_options(command: F) -> F:
    """What ``study`` and ``reproduce`` have in common."""
    for option in (
        click.option(
            "--seeds", type=click.IntRange(min=1), help="How many seeds, counted from 0. [default: the study's]"
        ),
        click.option("--row", "rows", multiple=True, help="Execute this row only; may be given several times."),
        click.option(
            "--setting", "settings", multiple=True, help="Execute this setting only; may be given several times."
        ),
        click.option(
            "--data-dir",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder with the data sets' files; nothing is downloaded.",
        ),
        click.option("--workers", type=click.IntRange(min=1), help="Runs at a time. [default: number of cores]"),
    ):
        command = option(command)
    return command


def _run_study(
    record: StudyRecord,
    out: Path,
    *,
    rows: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    workers: int | None = None,
) -> None:
    """Execute what has no result yet, and write the results of all there is whenever a run has ended."""
    runs, runs_folder = record.runs(), out / record.runs_folder
    chosen = pending(select(runs, rows, settings), runs_folder)
    check(chosen)
    record.write(out)
    results = record.results(out)
    results.write(out, record.command)
    with study_progress(Console(stderr=True), chosen) as progress:

        def tell(event: StudyEvent) -> None:
            nonlocal results
            progress(event)
            if event.ended:
                results = StudyResults.read(record.study, runs, runs_folder, results)
                results.write(out, record.command)

        execute(chosen, runs_folder, workers, tell)
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


@cli.command("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for everything.")
@click.option("--scale", type=click.Choice(list(SCALES)), help="Sizes for known data sets, over those of base.")
@_study_options
def study_command(file: Path, out: Path, seeds: int | None, data_dir: Path | None, **options: Any) -> None:
    """Run all rows of a study, a YAML file, side by side; the same command resumes after a kill."""
    scale = options.pop("scale")
    command = f"fdcr-fast study {file.name} --out DIR" + (f" --scale {scale}" if scale else "")
    with clear_ending(_same_command):
        study = Study.from_yaml(file.read_text())
        record = StudyRecord.of(study, command, "runs", scale=scale, seeds=seeds, data_dir=data_dir)
        _run_study(record, out, **options)


@cli.command()
@click.argument("name", type=click.Choice(shipped_studies()))
@click.option(
    "--scale",
    type=click.Choice(list(SCALES)),
    default="small",
    show_default=True,
    help="small: half a minute to a minute per run on one core; paper: up to an hour.",
)
@click.option("--leak", is_flag=True, help="Attackers upload random Fishers: what the published code simulates.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("reproduction"),
    show_default=True,
    help="Folder for NAME-SCALE[-leak], and for the runs, which all tables and figures share.",
)
@_study_options
def reproduce(
    name: str, scale: str, leak: bool, out: Path, seeds: int | None, data_dir: Path | None, **options: Any
) -> None:
    """Rerun a table or figure of the paper; the same command resumes after a kill."""
    command = f"fdcr-fast reproduce {name} --scale {scale} --data-dir DIR" + (" --leak" if leak else "")
    overrides = {"attacker_fisher": "random"} if leak else {}
    with clear_ending(_same_command):
        study = Study.shipped(name)
        record = StudyRecord.of(
            study, command, "../runs", scale=scale, seeds=seeds, data_dir=data_dir, overrides=overrides
        )
        _run_study(record, out / (f"{name}-{scale}-leak" if leak else f"{name}-{scale}"), **options)


@cli.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fdcr-demo"),
    show_default=True,
    help="Folder for everything.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="How many, counted from 0.")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at a time. [default: number of cores]")
def demo(out: Path, seeds: int, workers: int | None) -> None:
    """Compare FedAvg, FLAME, FDCR, CoalitionFDCR and an oracle against a backdoor; takes half a minute.

    The data are the digits of scikit-learn. The same command resumes after a kill.
    """
    with clear_ending(_same_command):
        _run_study(StudyRecord.of(DEMO, "fdcr-fast demo", "runs", seeds=seeds), out, workers=workers)
    click.echo(
        "oracle: a baseline that is told who is malicious. One seed is one seed: of five, CoalitionFDCR loses none\n"
        "and FDCR four (--seeds 5, docs/results/digits).\n"
        f"The figure: {out / 'attack-success.png'}, and .svg for slides."
    )


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="HTML file. [default: report.html in the folder]"
)
def report(folder: Path, out: Path | None) -> None:
    """Make one HTML page of the run or the study in a folder: tables, figures, who was dropped when and why.

    The page needs no network and no other file.
    """
    with clear_ending(lambda: "The page was not written."):
        click.echo(f"The report is {write_page(folder, out or folder / 'report.html')}")
