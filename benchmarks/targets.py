"""What a comparison must reach, and what is said of one that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Times


@dataclass(frozen=True)
class Target:
    """A bound on our time beside that of a yardstick, or on its own.

    Attributes:
        bound: The least share of the yardstick's speed, or the most of its time, or of milliseconds.
        kind: ``"share"``, ``"multiple"`` or ``"ms"``.
    """

    bound: float
    kind: str = "share"

    def __str__(self) -> str:
        return f"{'>=' if self.kind == 'share' else '<='} {self.bound:g}{' ms' if self.kind == 'ms' else ''}"

    def measured(self, ours: Times, yardstick: Times) -> tuple[float, float, float]:
        """Median and quartiles, within the rounds, of what is bounded."""
        if self.kind == "share":
            values = yardstick.ratios(ours)
        elif self.kind == "multiple":
            values = ours.ratios(yardstick)
        else:
            values = Times(tuple(1e3 * seconds for seconds in ours.seconds))
        return values.median, *values.quartiles

    def excess(self, value: float) -> float:
        """Our time over the longest that would reach the target."""
        return self.bound / value if self.kind == "share" else value / self.bound


def verdict(excess: float, phases: Mapping[str, float]) -> str:
    """``reached``, or by how much it was missed and, where the phases are known, where most of the time goes."""
    if excess <= 1:
        return "reached"
    text = f"missed: {excess:.2f} x the time"
    if phases:
        longest = max(phases, key=lambda name: phases[name])
        text += f", {100 * phases[longest] / sum(phases.values()):.0f} % of it {longest}"
    return text


def summary(rows: Mapping[str, Any]) -> str:
    """How many targets were reached, what was missed, and what was measured on a busy machine."""
    judged = {key: row for key, row in rows.items() if "excess" in row}
    missed = sorted((key for key, row in judged.items() if row["excess"] > 1), key=lambda key: -judged[key]["excess"])
    busy = [key for key, row in rows.items() if row["busy"]]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets reached."]
    if missed:
        lines.append("Missed: " + "; ".join(f"{key} ({judged[key]['excess']:.2f} x)" for key in missed) + ".")
    lines.append(
        f"**The machine was busy in {len(busy)} of {len(rows)} rows, which are not to be trusted.**"
        if busy
        else "The machine was idle all the time."
    )
    return "\n".join(lines)
