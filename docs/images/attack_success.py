"""Draws attack-success.svg from three rows of docs/studies/digits.yaml: python docs/images/attack_success.py"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fdcr_fast.sim import simulate
from fdcr_fast.sim.study import Study

FOLDER = Path(__file__).parent
COLOURS = {"FedAvg": "#777777", "FDCR": "#d95f02", "CoalitionFDCR": "#1b6ca8"}


def attack_success() -> dict[str, list[list[float]]]:
    """Attack success rates in per cent: of each row, of each seed, after each round."""
    runs = Study.from_yaml((FOLDER.parent / "studies" / "digits.yaml").read_text()).runs()
    return {
        row: [
            [100 * (record.attack_success_rate or 0.0) for record in simulate(run.config).rounds]
            for run in runs
            if run.row == row
        ]
        for row in COLOURS
    }


def draw(rows: dict[str, list[list[float]]]) -> Figure:
    """A panel for each row: a thin line for each seed, a thick one for their mean."""
    figure = Figure(figsize=(9, 2.9), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(rows), sharey=True)
    for axes, (name, lines) in zip(panels, rows.items(), strict=True):
        rounds = range(1, len(lines[0]) + 1)
        axes.plot(rounds, np.transpose(lines), color=COLOURS[name], linewidth=0.8, alpha=0.6)
        axes.plot(rounds, np.mean(lines, axis=0), color=COLOURS[name], linewidth=3)
        last = np.mean([line[-5:] for line in lines])
        axes.set_title(f"{name}: {last:.0f} %", color=COLOURS[name], fontweight="bold")
        axes.set_xlabel("round")
        axes.set_ylim(-2, 102)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("attack success rate (%)")
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "fdcr_fast", "svg.fonttype": "none"})  # the same small file every time
    draw(attack_success()).savefig(FOLDER / "attack-success.svg", metadata={"Date": None})
