"""Tables and progress for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fdcr_fast.sim import federation
from fdcr_fast.sim.federation import ProgressEvent
from fdcr_fast.sim.metrics import Summary


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f}"


def comparison_table(summaries: Mapping[str, Summary]) -> Table:
    """One row per run, figures in per cent."""
    averaged = max(summary.averaged_rounds for summary in summaries.values())
    table = Table(title=f"Mean of the last {averaged} rounds, in per cent", title_justify="left")
    table.add_column("server")
    for heading in ("A", "ASR", "R", "(A+R)/2", "TPR", "FPR", "seconds"):
        table.add_column(heading, justify="right")
    for name, summary in summaries.items():
        table.add_row(
            name,
            percent(summary.accuracy),
            percent(summary.attack_success_rate),
            percent(summary.backdoor_failure_rate),
            percent(summary.tradeoff),
            percent(summary.true_positive_rate),
            percent(summary.false_positive_rate),
            f"{sum(summary.seconds.values()):.1f}",
        )
    table.caption = "A accuracy, ASR attack success rate, R = 100 - ASR,\nTPR/FPR malicious/benign clients excluded"
    table.caption_justify = "left"
    return table


def cost_line(summary: Summary) -> str:
    """Seconds by phase and peak memory."""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items())
    uploads = f"uploads rejected {summary.rejected}, missing {summary.missing}"
    return f"{phases}; peak memory {summary.peak_rss_bytes / 2**20:.0f} MiB; {uploads}"


@contextmanager
def progress_bar(console: Console, name: str, rounds: int, clients: int) -> Iterator[federation.Progress]:
    """A bar that counts trained clients and shows the last round's figures."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clients"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bar:
        # Hidden until something happens, so that a configuration error shows no bar.
        task = bar.add_task(name, total=rounds * clients, figures="", visible=False)

        def update(event: ProgressEvent) -> None:
            bar.update(task, completed=(event.round - 1) * clients + event.clients_done, visible=True)
            if event.record is not None:
                accuracy, success = event.record.accuracy, event.record.attack_success_rate
                bar.update(task, figures=f"round {event.round}: A {percent(accuracy)} ASR {percent(success)}")

        yield update
