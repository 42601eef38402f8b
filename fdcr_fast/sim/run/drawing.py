"""What all figures share: axes, colours, labels beside lines, and files; matplotlib's global state stays as it is."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fdcr_fast.sim.run.folder import write_atomically
from fdcr_fast.sim.run.records import RoundRecord

BENIGN, MALICIOUS = "tab:blue", "tab:red"  # and with them accuracy and the success of the attack
MAX_LINES = 40

# Vector files keep their text, and are the same bytes every time.
_STABLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fdcr_fast"}


def new_figure(rows: int, columns: int, width: float, height: float, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure with a title, and its panels line by line.

    Args:
        rows: Lines of panels.
        columns: Panels in a line.
        width: Of a panel, in inches.
        height: Of a panel.
        title: Above all panels.
    """
    figure = Figure(figsize=(width * columns, height * rows + 0.3), dpi=120, layout="constrained", facecolor="white")
    head(figure, title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def head(figure: Figure, title: str) -> None:
    """Give a figure its title, in as many lines as its width makes necessary."""
    letters = int(10 * figure.get_figwidth())
    figure.suptitle(literal(textwrap.fill(title, letters)), fontweight="bold", fontsize=11)


def literal(name: str) -> str:
    """A name from a configuration, in which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def rounds_axis(axes: Axes, rounds: int) -> None:
    """Label the horizontal axis with the numbers of the rounds."""
    axes.set_xlabel("round")
    axes.set_xlim(0.5, rounds + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def percent_axis(axes: Axes, label: str) -> None:
    """From 0 to 100, with whole lines where they run along the ends."""
    axes.set_ylabel(label)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    for line in axes.lines:
        line.set_clip_on(False)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def distinct(index: int, rounds: int) -> dict[str, Any]:
    """How to draw one of several lines over the rounds: where one hides another, the markers of both are seen."""
    step = min(5, rounds)
    return {"marker": "osD^vXPp<>"[index % 10], "markersize": 5, "markevery": (index % step, step)}


def label_lines(axes: Axes, lines: Sequence[Line2D], height: float = 7) -> None:
    """Write each line's label beside its right end, in its colour, one above the other where ends lie close together.

    Args:
        axes: A panel with a percent axis.
        lines: Some of its lines.
        height: Of a label, in units of the axis.
    """
    ends = []
    for line in lines:
        values = np.asarray(line.get_ydata(), dtype=float)
        ends += [(float(value), line) for value in values[~np.isnan(values)][-1:]]
    ends.sort(key=lambda end: end[0])
    place = float("-inf")
    places = [place := max(place + height, value) for value, _ in ends]
    excess = max(0.0, places[-1] - 100) if places else 0.0  # too many at the top: all of them move down a little
    for (_, line), y in zip(ends, places, strict=True):
        axes.annotate(
            str(line.get_label()),
            (1, y - excess),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def column(rounds: Sequence[RoundRecord], name: str) -> list[float]:
    """One field of every round in per cent, NaN where it is undefined."""
    values = [getattr(record, name) for record in rounds]
    return [float("nan") if value is None else 100 * value for value in values]


def rendered(figure: Figure, form: str) -> bytes:
    """A figure as a file of the format ``svg`` or ``png``."""
    file = io.BytesIO()
    with mpl.rc_context(_STABLE):
        figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else {})
    return file.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG and an SVG file, beside a path without suffix.

    Raises:
        OSError: naming the file, such as where the disk is full; there is no part of it then.
    """
    for form in ("png", "svg"):
        write_atomically(path.with_name(f"{path.name}.{form}"), rendered(figure, form))
        figure.set_layout_engine("none")  # everything has its place now, which took half of the time
