"""The command line. Flags of ``simulate`` are the fields of :class:`fdcr_fast.sim.SimulationConfig`.

Help, typos and settings that cannot be need no PyTorch, which takes seconds to import: it comes with
:mod:`fdcr_fast.commands`, when there is something to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fdcr_fast._version import __version__
from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER
from fdcr_fast.sim.notation import OneOf, explain
from fdcr_fast.sim.settings import Settings
from fdcr_fast.sim.study.paper import SCALES, shipped_studies


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


class Commands(click.Group):
    """A group of commands that know their command line: it is their context's ``obj``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments before they are parsed."""
        ctx.obj = list(args)
        return super().parse_args(ctx, args)


@click.group(cls=Commands, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """FDCR backdoor defence for federated learning."""
    if context.invoked_subcommand is None:
        from fdcr_fast.commands import show_info

        show_info(tested=False)
        click.echo("\nfdcr-fast --help lists the commands.")


@cli.command()
@click.option("--self-test", "tested", is_flag=True, help="Compare what is installed with plain PyTorch: ten seconds.")
def info(tested: bool) -> None:
    """Show version, PyTorch, threads, and which backends are usable or why not."""
    from fdcr_fast.commands import show_info

    show_info(tested)


def _check_settings(file: Path | None, overrides: dict[str, Any]) -> None:
    """Refuse what is no setting, before there is anything to wait for."""
    try:
        Settings.from_yaml(file.read_text() if file else "", overrides)
    except ValidationError as error:
        raise click.ClickException(explain(error)) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


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
    if resumed is None:
        _check_settings(config, overrides)
    elif config or out or overrides:
        raise click.UsageError("--resume takes every setting from its folder and goes with no other flag")
    from fdcr_fast.commands import run_simulation

    run_simulation(config, out, resumed, overrides)


simulate_command.params += [config_option(name, field) for name, field in Settings.model_fields.items()]


RUNS_AT_A_TIME = "Runs at a time. [default: as many as the cores suffice for]"

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
        click.option("--workers", type=click.IntRange(min=1), help=RUNS_AT_A_TIME),
    ):
        command = option(command)
    return command


@cli.command("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for everything.")
@click.option("--scale", type=click.Choice(list(SCALES)), help="Sizes for known data sets, over those of base.")
@_study_options
def study_command(file: Path, out: Path, seeds: int | None, data_dir: Path | None, **options: Any) -> None:
    """Run all rows of a study, a YAML file, side by side; the same command resumes after a kill."""
    from fdcr_fast.commands import run_study

    run_study(file, out, seeds, data_dir, options.pop("scale"), options)


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
    from fdcr_fast.commands import rerun

    rerun(name, scale, leak, out, seeds, data_dir, options)


@cli.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fdcr-demo"),
    show_default=True,
    help="Folder for everything.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="How many, counted from 0.")
@click.option("--workers", type=click.IntRange(min=1), help=RUNS_AT_A_TIME)
def demo(out: Path, seeds: int, workers: int | None) -> None:
    """Compare FedAvg, FLAME, FDCR, CoalitionFDCR and an oracle against a backdoor; takes half a minute.

    The data are the digits of scikit-learn. The same command resumes after a kill.
    """
    from fdcr_fast.commands import run_demo

    run_demo(out, seeds, workers)


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="HTML file. [default: report.html in the folder]"
)
def report(folder: Path, out: Path | None) -> None:
    """Make one HTML page of the run or the study in a folder: tables, figures, who was dropped when and why.

    The page needs no network and no other file.
    """
    from fdcr_fast.commands import make_report

    make_report(folder, out)
