"""Tables and progress for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fdcr_fast.sim.run.evaluation import PROBLEMS
from fdcr_fast.sim.run.metrics import MEASURES
from fdcr_fast.sim.run.records import RoundRecord, Summary
from fdcr_fast.sim.run.result import Progress, ProgressEvent

COMPARED = (  # measures that a line of a terminal has room for
    "accuracy",
    "attack_success_rate",
    "backdoor_failure_rate",
    "tradeoff",
    "true_positive_rate",
    "false_positive_rate",
)
DEAD_MODELS = "A low attack success rate of such a model is no sign of a defence."


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f}"


def model_state(summary: Summary) -> str:
    """The problems of the global model, with the number of rounds that have them; ``ok`` if there is none."""
    return (
        ", ".join(f"{problem} {count}/{summary.averaged_rounds}" for problem, count in summary.problems.items()) or "ok"
    )


def problem_lines(name: str, summary: Summary) -> list[str]:
    """A line for each problem of a run's global model."""
    averaged = summary.averaged_rounds
    return [
        f"{name}: in {count} of the last {averaged} rounds the global model {PROBLEMS[problem]}"
        for problem, count in summary.problems.items()
    ]


def figures_of(record: RoundRecord) -> str:
    """A round's figures for a progress bar."""
    problem = "" if record.problem is None else f" ({record.problem})"
    return f"A {percent(record.accuracy)} ASR {percent(record.attack_success_rate)}{problem}"


def comparison_table(summaries: Mapping[str, Summary]) -> Table:
    """One row per run, figures in per cent; with a column for the state of the global models if one is dead."""
    averaged = max(summary.averaged_rounds for summary in summaries.values())
    table = Table(title=f"Mean of the last {averaged} rounds, in per cent", title_justify="left")
    table.add_column("server")
    for heading in [*(MEASURES[measure].heading for measure in COMPARED), "seconds"]:
        table.add_column(heading, justify="right")
    dead = any(summary.problems for summary in summaries.values())
    if dead:
        table.add_column("model")
    for name, summary in summaries.items():
        table.add_row(
            name,
            *(percent(getattr(summary, measure)) for measure in COMPARED),
            f"{summary.seconds:.1f}",
            *([model_state(summary)] if dead else []),
        )
    table.caption = "A accuracy, ASR attack success rate, R = 100 - ASR,\nTPR/FPR malicious/benign clients excluded"
    table.caption_justify = "left"
    return table


def cost_line(summary: Summary) -> str:
    """Wall time, seconds of all processes by phase, peak memory, and what became of the uploads."""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.phase_seconds.items())
    uploads = (
        f"uploads excluded {percent(summary.exclusion_rate)} %, rejected {summary.rejected}, missing {summary.missing}"
    )
    memory = f"peak memory {summary.peak_rss_bytes / 2**20:.0f} MiB"
    return f"wall time {summary.seconds:.1f} s; {phases}; {memory}; {uploads}"


@contextmanager
def progress_bar(console: Console, name: str, rounds: int, clients: int) -> Iterator[Progress]:
    """A bar that counts trained clients and shows the last round's figures."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clients"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=console) as bar:
        # Hidden until something happens, so that a configuration error shows no bar.
        task = bar.add_task(name, total=rounds * clients, figures="", visible=False)

        def update(event: ProgressEvent) -> None:
            bar.update(task, completed=(event.round - 1) * clients + event.clients_done, visible=True)
            if event.record is not None:
                bar.update(task, figures=f"round {event.round}: {figures_of(event.record)}")

        yield update
