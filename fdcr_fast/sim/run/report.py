"""Tables, and progress for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

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
MEANINGS = "A accuracy, ASR attack success rate, R = 100 - ASR,\nTPR/FPR malicious/benign clients excluded"
DEAD_MODELS = "A low attack success rate of such a model is no sign of a defence."


@dataclass(frozen=True)
class Table:
    """A table of texts, which a terminal, a Markdown file or a page shows.

    Attributes:
        headings: Of the columns.
        lines: Cells, as many in each line.
        texts: Which columns hold words, to be read from the left; the others hold numbers.
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    texts: Collection[int] = (0,)

    def to_markdown(self) -> str:
        """The table in Markdown."""
        rules = ["---" if column in self.texts else "---:" for column in range(len(self.headings))]
        lines = [[cell.replace("|", r"\|") for cell in line] for line in (self.headings, rules, *self.lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_rich(self, title: str = "", caption: str = "") -> rich_table.Table:
        """The table for a terminal."""
        # As texts, in which brackets are no styles.
        shown = rich_table.Table(title=Text(title), title_justify="left", caption=Text(caption), caption_justify="left")
        for column, heading in enumerate(self.headings):
            shown.add_column(Text(heading), justify="left" if column in self.texts else "right")
        for line in self.lines:
            shown.add_row(*(Text(cell.replace(" ± ", "±")) for cell in line))
        return shown


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


def summary_table(server: str, summary: Summary) -> rich_table.Table:
    """What a run gave, in per cent; with a column for the state of the global model if it is dead."""
    headings = ["server", *(MEASURES[measure].heading for measure in COMPARED), "seconds"]
    line = [server, *(percent(getattr(summary, measure)) for measure in COMPARED), f"{summary.seconds:.1f}"]
    if summary.problems:
        headings, line = [*headings, "model"], [*line, model_state(summary)]
    return Table(headings, [line]).to_rich(f"Mean of the last {summary.averaged_rounds} rounds, in per cent", MEANINGS)


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
        TextColumn("{task.description}", markup=False),
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
