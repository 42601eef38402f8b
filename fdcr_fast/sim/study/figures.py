"""Figures of a study."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fdcr_fast.sim.run.figures import (
    clients_figure,
    column,
    ranks_panel,
    rounds_axis,
    save_figure,
    similarity_figure,
    watched_rules,
)
from fdcr_fast.sim.study.results import FinishedRun, StudyResults

COLUMNS = 3


def write_figures(results: StudyResults, out: Path) -> None:
    """Write the study's figures as PNG, of whatever has finished."""
    if not results.finished:
        return
    for name in results.study.figures:
        if name in OF_THE_STUDY:
            save_figure(OF_THE_STUDY[name](results), out / f"{name}.png")
            continue
        for setting in results.study.settings:
            for row in results.study.rows:
                for done in results.seeds(setting.name, row.name)[:1]:
                    figure = OF_A_RUN[name](done.result)
                    figure.suptitle(done.run.label)
                    save_figure(figure, out / f"{_slug(f'{name}-{setting.name}-{row.name}')}.png")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width * columns, height * rows), dpi=120, layout="constrained")
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def summary_figure(results: StudyResults) -> Figure:
    """A and R of every row: mean and sample standard deviation over the seeds; hollow, what the paper reports."""
    settings, rows = results.study.settings, results.study.rows
    columns = min(COLUMNS, len(settings))
    lines = math.ceil(len(settings) / columns)
    figure, panels = _grid(lines, columns, 4.5, 0.28 * len(rows) + 1.2)
    places = [panel for line in panels for panel in line]
    for axes in places[len(settings) :]:
        axes.set_visible(False)
    for index, (setting, axes) in enumerate(zip(settings, places, strict=False)):
        for measure, name, label, colour in (
            (0, "accuracy", "A", "tab:blue"),
            (1, "backdoor_failure_rate", "R", "tab:orange"),
        ):
            offset = 0.3 * measure - 0.15
            for place, row in enumerate(rows):
                values = [done.measures[name] for done in results.seeds(setting.name, row.name)]
                percents = [100 * value for value in values if value is not None]
                if percents:
                    spread = statistics.stdev(percents) if len(percents) > 1 else 0
                    axes.errorbar(
                        statistics.mean(percents), place + offset, xerr=spread, fmt="o", color=colour, markersize=4
                    )
                reported = row.paper[index] if row.paper else None
                if reported is not None:
                    axes.plot(reported[measure], place + offset, "o", color=colour, markersize=6, fillstyle="none")
            axes.plot([], [], "o", color=colour, label=label)
        axes.set_title(setting.name, fontsize=10)
        axes.set_yticks(range(len(rows)), labels=[row.name for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-3, 103)
        axes.grid(alpha=0.3)
    if any(row.paper for row in rows):
        places[0].plot([], [], "o", color="grey", fillstyle="none", label="paper")
    places[0].legend(fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("per cent")
    return figure


def rounds_figure(results: StudyResults) -> Figure:
    """A and R over the rounds, a line of panels per setting: mean over the seeds, shaded from least to most."""
    rows = results.study.rows
    begun = {done.run.setting for done in results.finished}
    settings = [setting for setting in results.study.settings if setting.name in begun]
    figure, panels = _grid(len(settings), 2, 5.5, 3.4)
    colours = colormaps["tab20" if len(rows) > 10 else "tab10"]
    for setting, line in zip(settings, panels, strict=True):
        for axes, name, label in zip(line, ("accuracy", "backdoor_failure_rate"), ("A (%)", "R (%)"), strict=True):
            for index, row in enumerate(rows):
                runs = [column(done.result.rounds, name) for done in results.seeds(setting.name, row.name)]
                if not runs:
                    continue
                values = np.array(runs)
                steps = np.arange(1, values.shape[1] + 1)
                axes.plot(steps, values.mean(0), color=colours(index), label=row.name)
                axes.fill_between(steps, values.min(0), values.max(0), color=colours(index), alpha=0.15, linewidth=0)
            axes.set_ylabel(label)
            axes.set_ylim(-3, 103)
            axes.set_title(setting.name, fontsize=10)
            rounds_axis(axes, max(run.config.rounds for run in results.runs))
    lines = {line.get_label(): line for panel, _ in panels for line in panel.lines}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def ranks_figure(results: StudyResults) -> Figure:
    """How the rules that looked on ranked the attackers: a line of panels per setting and seed, side by side the rows.

    See :func:`fdcr_fast.sim.run.figures.ranks_panel`; of runs in which no rule looked on there is nothing.
    """
    lines: dict[tuple[str, int], list[tuple[FinishedRun, str]]] = {}
    for done in results.finished:
        for rule in watched_rules(done.result):
            lines.setdefault((done.run.setting, done.run.config.seed), []).append((done, rule))
    figure, panels = _grid(max(1, len(lines)), max(map(len, lines.values()), default=1), 5, 3)
    for axes in itertools.chain.from_iterable(panels):
        axes.set_visible(False)
    for line, shown in zip(panels, lines.values(), strict=False):  # of nothing there is one panel, which is not shown
        for axes, (done, rule) in zip(line, shown, strict=False):
            axes.set_visible(True)
            ranks_panel(axes, done.result, rule)
            axes.set_title(f"{done.run.label}: {rule}", fontsize=10)
    return figure


OF_THE_STUDY: dict[str, Callable[[StudyResults], Figure]] = {
    "summary": summary_figure,
    "rounds": rounds_figure,
    "ranks": ranks_figure,
}
OF_A_RUN: dict[str, Callable[..., Figure]] = {"clients": clients_figure, "similarity": similarity_figure}
