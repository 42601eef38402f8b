"""Figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from fdcr_fast.sim.run.drawing import (
    BENIGN,
    MALICIOUS,
    MAX_LINES,
    column,
    label_lines,
    literal,
    new_figure,
    percent_axis,
    rounds_axis,
    save_figure,
)
from fdcr_fast.sim.run.metrics import FINAL_ROUNDS
from fdcr_fast.sim.run.records import RoundRecord
from fdcr_fast.sim.run.result import SimulationResult

MAX_ANNOTATED = 15
PANELS = 5  # in a line


def title_of(result: SimulationResult) -> str:
    """What was run, in a line."""
    config = result.config
    attackers = len(config.attackers())
    return f"{config.server} on {config.dataset}, {config.clients} clients, {attackers} of them malicious"


def accuracy_figure(result: SimulationResult) -> Figure:
    """Accuracy and attack success rate over the rounds."""
    figure, (axes,) = new_figure(1, 1, 6.5, 3.6, title_of(result))
    steps = [record.round for record in result.rounds]
    lines = [
        axes.plot(steps, column(result.rounds, name), f"{marker}-", color=colour, markersize=3.5, label=label)[0]
        for name, label, colour, marker in (
            ("accuracy", "accuracy", BENIGN, "o"),
            ("attack_success_rate", "attack success", MALICIOUS, "s"),
        )
    ]
    percent_axis(axes, "per cent")
    rounds_axis(axes, len(result.rounds))
    label_lines(axes, lines)
    return figure


Seeds = Sequence[Sequence[RoundRecord]]  # the rounds of each seed


def attack_success_figure(rows: Mapping[str, Seeds], title: str) -> Figure:
    """Attack success rate and accuracy over the rounds, a panel for each row.

    A thin line for each seed and a thick one for their mean; a panel is headed by the mean attack success rate of the
    last rounds.
    """
    columns = min(PANELS, len(rows))
    figure, panels = new_figure(-(-len(rows) // columns), columns, 2.3, 2.5, title)
    for axes, (name, seeds) in zip(panels, rows.items(), strict=False):
        steps = [record.round for record in max(seeds, key=len)]
        for metric, colour in (("accuracy", BENIGN), ("attack_success_rate", MALICIOUS)):
            values = np.array([column(rounds, metric) for rounds in seeds])
            if len(seeds) > 1:
                axes.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(steps, values.mean(0), color=colour, linewidth=2.5)
        last = np.mean([column(rounds, "attack_success_rate")[-FINAL_ROUNDS:] for rounds in seeds])
        axes.set_title(literal(f"{name}: {last:.0f} %"), color=MALICIOUS, fontsize=10, fontweight="bold")
        percent_axis(axes, "per cent" if axes in panels[::columns] else "")
        rounds_axis(axes, len(steps))
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    thin = "; thin: each seed" if max(map(len, rows.values())) > 1 else ""
    success = f"attack success rate (number: last {FINAL_ROUNDS} rounds{thin})"
    figure.legend(
        handles=[
            Line2D([], [], color=MALICIOUS, linewidth=2.5, label=success),
            Line2D([], [], color=BENIGN, linewidth=2.5, label="accuracy"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def clients_figure(result: SimulationResult) -> Figure:
    """Weight of every client over the rounds, by kind, and its score where the rule computes one.

    Of FDCR it is the paper's figure 2, with ``V_k``.
    """
    scored = [record.discrepancy for record in result.clients if record.discrepancy is not None]
    names = (
        {"discrepancy": "discrepancy $V_k$" if result.config.server == "fdcr" else "score of the rule"}
        if scored
        else {}
    )
    names["weight"] = "weight in the new model"
    figure, panels = new_figure(1, len(names), 5, 3.6, title_of(result))
    kinds: dict[str, Line2D] = {}
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for malicious, kind, colour in ((False, "benign", BENIGN), (True, "malicious", MALICIOUS)):
            mean, members = _draw_clients(axes, result, name, malicious, colour)
            if mean is not None:
                kinds[f"{kind}, mean of {members}"] = mean
        axes.set_ylabel(label)
        rounds_axis(axes, len(result.rounds))
    panels[-1].set_ylim(bottom=0)
    if scored and min(scored) > 0:
        panels[0].set_yscale("log")
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_clients(
    axes: Axes, result: SimulationResult, name: str, malicious: bool, colour: str
) -> tuple[Line2D | None, int]:
    """A thin line for each of some clients and a thick one for the mean of all, with how many they are."""
    rounds = np.arange(1, len(result.rounds) + 1)
    lines: dict[int, NDArray[np.float64]] = {}
    total, count = np.zeros((2, len(rounds)))
    members = set()
    for record in result.clients:
        value = getattr(record, name)
        if record.malicious != malicious or not record.sent or value is None:
            continue
        members.add(record.client)
        if record.client in lines or len(lines) < MAX_LINES:
            lines.setdefault(record.client, np.full(len(rounds), np.nan))[record.round - 1] = value
        total[record.round - 1] += value
        count[record.round - 1] += 1
    if not members:
        return None, 0
    axes.plot(rounds, np.stack(list(lines.values()), axis=1), color=colour, linewidth=0.8, alpha=0.4)
    mean = np.divide(total, count, where=count > 0, out=np.full(len(rounds), np.nan))
    return axes.plot(rounds, mean, "s-" if malicious else "o-", color=colour, markersize=3.5)[0], len(members)


def similarity_figure(result: SimulationResult) -> Figure:
    """Similarity of the clients' importances in the last round (figure 1); malicious clients come last."""
    assert result.similarity is not None
    last = [record for record in result.clients if record.round == len(result.rounds)]
    compared = last[: len(result.similarity)]
    order = sorted(range(len(compared)), key=lambda index: (compared[index].malicious, index))
    matrix = result.similarity.numpy()[np.ix_(order, order)]
    figure, (axes,) = new_figure(1, 1, 6, 5, title_of(result))
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axes, label="cosine similarity of importance")
    axes.set_xlabel("client (malicious in red)")
    if len(order) > MAX_LINES:
        return figure
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(order)), labels=[str(compared[index].client) for index in order])
        for index, label in zip(order, axis.get_ticklabels(), strict=True):
            label.set_color(MALICIOUS if compared[index].malicious else "black")
    if len(order) <= MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


# What lines and areas of ranks look like, in panels and in their legend.
_ATTACKER: dict[str, Any] = {"color": MALICIOUS, "marker": "o", "linewidth": 0.8, "markersize": 2.5, "alpha": 0.6}
_SET: dict[str, Any] = {"color": "black", "marker": "s", "markersize": 3.5}
_SUCCESS: dict[str, Any] = {"color": "grey", "alpha": 0.25, "linewidth": 0}
_DROPPED: dict[str, Any] = {"color": "tab:green", "linestyle": "--", "linewidth": 1}


def watched_rules(result: SimulationResult) -> list[str]:
    """The rules that looked on, by name."""
    return list(dict.fromkeys(record.rule for record in result.ranks))


def ranks_panel(axes: Axes, result: SimulationResult, rule: str) -> None:
    """How a rule that looked on ranked the attackers and their set over the rounds, and what became of the model.

    On a scale that is logarithmic from 1 on: the set of the attackers among all minorities (black), and each attacker
    among the clients (red); 0 is the most suspected. Shaded, the attack success rate; dashed, the share of the
    attackers that the rule dropped, both in per cent. :func:`ranks_legend` says so.
    """
    ranks = [record for record in result.ranks if record.rule == rule]
    by_attacker: dict[int, list[tuple[int, int]]] = {}
    for record in result.scores:
        if record.rule == rule and record.malicious and record.rank is not None:
            by_attacker.setdefault(record.client, []).append((record.round, record.rank))
    for points in list(by_attacker.values())[:MAX_LINES]:
        axes.plot(*zip(*points, strict=True), **_ATTACKER)
    sets = [(record.round, record.set_rank) for record in ranks if record.set_rank is not None]
    if sets:
        axes.plot(*zip(*sets, strict=True), **_SET)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.2, 1.3 * max([record.sets or 0 for record in ranks] + [result.config.cohort()]))
    axes.set_ylabel("rank, 0 is most suspected")
    share = axes.twinx()
    steps = [record.round for record in result.rounds]
    share.fill_between(steps, column(result.rounds, "attack_success_rate"), **_SUCCESS)
    dropped = [float("nan") if r.true_positive_rate is None else 100 * r.true_positive_rate for r in ranks]
    share.plot([record.round for record in ranks], dropped, **_DROPPED)
    share.set_ylim(0, 103)
    share.set_ylabel("per cent")
    rounds_axis(axes, result.config.rounds)


def ranks_legend(figure: Figure) -> None:
    """What :func:`ranks_panel` draws, below all panels."""
    figure.legend(
        handles=[
            Line2D([], [], **_ATTACKER, label="each attacker, among the clients"),
            Line2D([], [], **_SET, label="all attackers, among the minorities"),
            Patch(**_SUCCESS, label="attack success rate (right)"),
            Line2D([], [], **_DROPPED, label="attackers dropped (right)"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )


def ranks_figure(result: SimulationResult) -> Figure:
    """How each of the rules that looked on ranked the attackers; see :func:`ranks_panel`."""
    rules = watched_rules(result)
    figure, panels = new_figure(1, len(rules), 5.5, 4, title_of(result))
    for axes, rule in zip(panels, rules, strict=True):
        ranks_panel(axes, result, rule)
        axes.set_title(literal(f"ranked by {rule}"), fontsize=10)
    ranks_legend(figure)
    return figure


def write_figures(result: SimulationResult, folder: Path) -> None:
    """Write the figures that the run has, as PNG and SVG: see :func:`figures_of`."""
    for name, figure in figures_of(result).items():
        save_figure(figure, folder / name)


def figures_of(result: SimulationResult) -> dict[str, Figure]:
    """``accuracy``, ``clients``, ``similarity`` where there are Fishers and ``ranks`` where rules looked on."""
    figures = {"accuracy": accuracy_figure(result), "clients": clients_figure(result)}
    if result.similarity is not None:
        figures["similarity"] = similarity_figure(result)
    if result.ranks:
        figures["ranks"] = ranks_figure(result)
    return figures
