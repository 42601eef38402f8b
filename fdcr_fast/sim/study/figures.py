"""Figures of a study."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fdcr_fast.sim.run.drawing import (
    column,
    distinct,
    head,
    literal,
    new_figure,
    percent_axis,
    rounds_axis,
    save_figure,
)
from fdcr_fast.sim.run.figures import (
    attack_success_figure,
    clients_figure,
    ranks_legend,
    ranks_panel,
    similarity_figure,
    watched_rules,
)
from fdcr_fast.sim.study.results import FinishedRun, StudyResults

COLUMNS = 3
MEASURED = (("accuracy", "A", "tab:blue"), ("backdoor_failure_rate", "R", "tab:orange"))


def write_figures(results: StudyResults, out: Path) -> None:
    """Write the study's figures as PNG and SVG, of whatever has finished."""
    for name, figure in figures_of(results):
        save_figure(figure, out / name)


def figures_of(results: StudyResults) -> Iterator[tuple[str, Figure]]:
    """The figures that the study asks for, by name, of whatever has finished."""
    for name in results.study.figures if results.finished else ():
        if name in OF_THE_STUDY:
            yield name, OF_THE_STUDY[name](results)
            continue
        for setting in results.study.settings:
            for row in results.study.rows:
                for done in results.seeds(setting.name, row.name)[:1]:
                    figure = OF_A_RUN[name](done.result)
                    head(figure, done.run.label)
                    yield _slug(f"{name}-{setting.name}-{row.name}"), figure


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _of_settings(results: StudyResults) -> list[str]:
    """The names of the settings in which something has finished."""
    begun = {done.run.setting for done in results.finished}
    return [setting.name for setting in results.study.settings if setting.name in begun]


def summary_figure(results: StudyResults) -> Figure:
    """A and R of every row: mean and sample standard deviation over the seeds; hollow, what the paper reports."""
    study = results.study
    columns = min(COLUMNS, len(study.settings))
    height = 0.28 * len(study.rows) + 1.2
    figure, panels = new_figure(math.ceil(len(study.settings) / columns), columns, 4.5, height, study.title)
    for axes in panels[len(study.settings) :]:
        axes.set_visible(False)
    for index, (setting, axes) in enumerate(zip(study.settings, panels, strict=False)):
        for measure, (name, _, colour) in enumerate(MEASURED):
            offset = 0.3 * measure - 0.15
            for place, row in enumerate(study.rows):
                percents = results.percents(setting.name, row.name, name)
                if percents:
                    _mean_and_spread(axes, percents, place + offset, colour)
                reported = row.paper[index] if row.paper else None
                if reported is not None:
                    axes.plot(reported[measure], place + offset, "o", color=colour, markersize=6, fillstyle="none")
        axes.set_title(literal(setting.name), fontsize=10)
        axes.set_yticks(range(len(study.rows)), labels=[literal(row.name) for row in study.rows], fontsize=8)
        axes.set_ylim(len(study.rows) - 0.4, -0.6)
        axes.set_xlim(-2, 102)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("per cent")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=label) for _, label, colour in MEASURED]
    if any(row.paper for row in study.rows):
        handles.append(Line2D([], [], marker="o", linestyle="", color="grey", fillstyle="none", label="paper"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _mean_and_spread(axes: Axes, percents: list[float], place: float, colour: str) -> None:
    """A dot, and a bar of one standard deviation to either side that ends where shares do."""
    mean = statistics.mean(percents)
    spread = statistics.stdev(percents) if len(percents) > 1 else 0.0
    bar = [[min(spread, mean)], [min(spread, 100 - mean)]]
    axes.errorbar(mean, place, xerr=bar, fmt="o", color=colour, markersize=4)


def rounds_figure(results: StudyResults) -> Figure:
    """A and R over the rounds, a line of panels per setting: mean over the seeds, shaded from least to most."""
    rows, settings = results.study.rows, _of_settings(results)
    figure, panels = new_figure(len(settings), 2, 5.5, 3.2, results.study.title)
    colours = colormaps["tab20" if len(rows) > 10 else "tab10"]
    lines: dict[str, Line2D] = {}
    for place, axes in enumerate(panels):
        setting, (name, label, _) = settings[place // 2], MEASURED[place % 2]
        for index, row in enumerate(rows):
            runs = [column(done.result.rounds, name) for done in results.seeds(setting, row.name)]
            if not runs:
                continue
            values = np.array(runs)
            steps = np.arange(1, values.shape[1] + 1)
            (lines[row.name],) = axes.plot(steps, values.mean(0), color=colours(index), **distinct(index, len(steps)))
            axes.fill_between(steps, values.min(0), values.max(0), color=colours(index), alpha=0.15, linewidth=0)
        percent_axis(axes, f"{label} (%)")
        axes.set_title(literal(setting), fontsize=10)
        rounds_axis(axes, max(run.config.rounds for run in results.runs))
    figure.legend(lines.values(), map(literal, lines), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def attack_figure(results: StudyResults) -> Figure:
    """Attack success rate and accuracy over the rounds, a panel for each row in each setting."""
    seeds: dict[str, list[FinishedRun]] = {}
    for done in results.finished:
        label = ", ".join(filter(None, (done.run.setting, done.run.row)))
        seeds.setdefault(label, []).append(done)
    rows = {label: [done.result.rounds for done in runs] for label, runs in seeds.items()}
    return attack_success_figure(rows, results.study.title)


def ranks_figure(results: StudyResults) -> Figure:
    """How the rules that looked on ranked the attackers: a line of panels per setting and seed, side by side the rows.

    See :func:`fdcr_fast.sim.run.figures.ranks_panel`; of runs in which no rule looked on there is nothing.
    """
    lines: dict[tuple[str, int], list[tuple[FinishedRun, str]]] = {}
    for done in results.finished:
        for rule in watched_rules(done.result):
            lines.setdefault((done.run.setting, done.run.config.seed), []).append((done, rule))
    columns = max(map(len, lines.values()), default=1)
    figure, panels = new_figure(max(1, len(lines)), columns, 5, 3, results.study.title)
    for axes in panels:
        axes.set_visible(False)
    for line, shown in enumerate(lines.values()):  # of nothing there is one panel, which is not shown
        for axes, (done, rule) in zip(panels[columns * line :], shown, strict=False):
            axes.set_visible(True)
            ranks_panel(axes, done.result, rule)
            axes.set_title(literal(f"{done.run.label}: {rule}"), fontsize=10)
    ranks_legend(figure)
    return figure


OF_THE_STUDY: dict[str, Callable[[StudyResults], Figure]] = {
    "summary": summary_figure,
    "rounds": rounds_figure,
    "ranks": ranks_figure,
    "attack-success": attack_figure,
}
OF_A_RUN: dict[str, Callable[..., Figure]] = {"clients": clients_figure, "similarity": similarity_figure}
