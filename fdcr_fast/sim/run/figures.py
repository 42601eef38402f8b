"""Figures of a run, drawn without any global state of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fdcr_fast.sim.run.folder import write_atomically
from fdcr_fast.sim.run.records import RoundRecord
from fdcr_fast.sim.run.result import SimulationResult

BENIGN, MALICIOUS = "tab:blue", "tab:red"
MAX_LINES = 40
MAX_ANNOTATED = 15


def _new(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def rounds_axis(axes: Axes, rounds: int) -> None:
    """Label the horizontal axis with the numbers of the rounds."""
    axes.set_xlabel("round")
    axes.set_xlim(0.5, rounds + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def column(rounds: Sequence[RoundRecord], name: str) -> list[float]:
    """One field of every round in per cent, NaN where it is undefined."""
    values = [getattr(record, name) for record in rounds]
    return [float("nan") if value is None else 100 * value for value in values]


def accuracy_figure(runs: Mapping[str, Sequence[RoundRecord]]) -> Figure:
    """Accuracy and attack success rate over the rounds, one line per run."""
    figure, panels = _new(2, 10, 4)
    names = {"accuracy": "accuracy A (%)", "attack_success_rate": "attack success rate (%)"}
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for index, (run, rounds) in enumerate(runs.items()):
            steps = [record.round for record in rounds]
            axes.plot(steps, column(rounds, name), f"{'os^Dvx'[index % 6]}-", markersize=3.5, label=run)
        axes.set_ylabel(label)
        axes.set_ylim(-3, 103)
        rounds_axis(axes, max(len(rounds) for rounds in runs.values()))
    panels[0].legend(loc="best")
    return figure


def clients_figure(result: SimulationResult) -> Figure:
    """Score and weight of every client over the rounds, by kind: of FDCR the paper's figure 2, with ``V_k``."""
    rounds = np.arange(1, len(result.rounds) + 1)
    figure, panels = _new(2, 10, 4)
    for axes, name in zip(panels, ("discrepancy", "weight"), strict=True):
        for malicious, kind, colour in ((False, "benign", BENIGN), (True, "malicious", MALICIOUS)):
            lines: dict[int, NDArray[np.float64]] = {}  # of some clients; the mean is that of all
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
                continue
            axes.plot(rounds, np.stack(list(lines.values()), axis=1), color=colour, linewidth=0.8, alpha=0.4)
            mean = np.divide(total, count, where=count > 0, out=np.full(len(rounds), np.nan))
            axes.plot(rounds, mean, "o-", color=colour, markersize=3.5, label=f"{kind}, mean of {len(members)}")
        rounds_axis(axes, len(rounds))
    score, weight = panels
    score.set_ylabel("discrepancy $V_k$" if result.config.server == "fdcr" else "score of the rule")
    weight.set_ylabel("weight in the new model")
    weight.set_ylim(bottom=0)
    weight.legend(loc="best")
    if score.lines:
        positive = all(record.discrepancy is None or record.discrepancy > 0 for record in result.clients)
        score.set_yscale("log" if positive else "linear")
    else:
        message = f"server {result.config.server} computes no scores"
        score.text(0.5, 0.5, message, ha="center", transform=score.transAxes)
        score.set_yticks([])
    return figure


def similarity_figure(result: SimulationResult) -> Figure:
    """Similarity of the clients' importances in the last round (figure 1); malicious clients come last."""
    assert result.similarity is not None
    last = [record for record in result.clients if record.round == len(result.rounds)]
    compared = last[: len(result.similarity)]
    order = sorted(range(len(compared)), key=lambda index: (compared[index].malicious, index))
    matrix = result.similarity.numpy()[np.ix_(order, order)]
    figure, (axes,) = _new(1, 6, 5)
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


def watched_rules(result: SimulationResult) -> list[str]:
    """The rules that looked on, by name."""
    return list(dict.fromkeys(record.rule for record in result.ranks))


def ranks_panel(axes: Axes, result: SimulationResult, rule: str) -> None:
    """How a rule that looked on ranked the attackers and their set over the rounds, and what became of the model.

    On a scale that is logarithmic from 1 on: the set of the attackers among all minorities (black), and each attacker
    among the clients (red); 0 is the most suspected. Shaded, the attack success rate; dashed, the share of the
    attackers that the rule dropped, both in per cent.
    """
    ranks = [record for record in result.ranks if record.rule == rule]
    by_attacker: dict[int, list[tuple[int, int]]] = {}
    for record in result.scores:
        if record.rule == rule and record.malicious and record.rank is not None:
            by_attacker.setdefault(record.client, []).append((record.round, record.rank))
    for points in list(by_attacker.values())[:MAX_LINES]:
        axes.plot(*zip(*points, strict=True), "o-", color=MALICIOUS, linewidth=0.8, markersize=2.5, alpha=0.6)
    sets = [(record.round, record.set_rank) for record in ranks if record.set_rank is not None]
    if sets:
        axes.plot(*zip(*sets, strict=True), "s-", color="black", markersize=3.5)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.2, 1.3 * max([record.sets or 0 for record in ranks] + [result.config.cohort()]))
    axes.set_ylabel("rank, 0 is most suspected")
    share = axes.twinx()
    steps = [record.round for record in result.rounds]
    share.fill_between(steps, column(result.rounds, "attack_success_rate"), color="grey", alpha=0.25, linewidth=0)
    dropped = [float("nan") if r.true_positive_rate is None else 100 * r.true_positive_rate for r in ranks]
    share.plot([record.round for record in ranks], dropped, "--", color="tab:green", linewidth=1)
    share.set_ylim(0, 103)
    share.set_ylabel("ASR (shaded), TPR (dashed), %")
    rounds_axis(axes, result.config.rounds)


def ranks_figure(result: SimulationResult) -> Figure:
    """How each of the rules that looked on ranked the attackers; see :func:`ranks_panel`."""
    rules = watched_rules(result)
    figure, panels = _new(len(rules), 5.5 * len(rules), 4)
    for axes, rule in zip(panels, rules, strict=True):
        ranks_panel(axes, result, rule)
        axes.set_title(f"{rule} under {result.config.server}", fontsize=10)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file.

    Raises:
        OSError: naming the file, such as where the disk is full; there is no part of it then.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def write_figures(result: SimulationResult, folder: Path) -> None:
    """Write accuracy.png, clients.png, similarity.png where there are Fishers and ranks.png where rules looked on."""
    save_figure(accuracy_figure({result.config.server: result.rounds}), folder / "accuracy.png")
    save_figure(clients_figure(result), folder / "clients.png")
    if result.similarity is not None:
        save_figure(similarity_figure(result), folder / "similarity.png")
    if result.ranks:
        save_figure(ranks_figure(result), folder / "ranks.png")
