"""The table of limits: every target with its verdict, and the phases of what misses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import Bench, Comparison
from benchmarks.phases import shares
from benchmarks.tables import Report
from benchmarks.targets import Target, summary, verdict
from fdcr_fast import _native

COLUMNS = ("", "K", "P", "ms", "measured", "of", "target", "verdict", "phases", "busy", "rounds")
SHARE = 0.25  # of the seconds, for most comparisons

REPORT = Report(
    "limits",
    "Limits",
    "python -m pytest benchmarks/limits",
    """\
*measured*: speed of ours as a share of the yardstick's, or its time as a multiple: median and quartiles of the ratios
within interleaved repeats in one process. *phases*: of a run by itself, those of a hundredth or more. *busy*: cores
that others kept busy, or half the distance of the quartiles of the yardstick's times, where either is large.

Rounds: float32, one client in ten an attacker; FDCR with two-means, but beside PyTorch all rules with their default
options. Yardsticks of a whole ``aggregate``: a *raw read* is ``torch.sum``, a plain SIMD sum, over as many bytes as the
rule needs; *mv* is ``torch.mv(D.t(), w)``; *PyTorch* the shortest code that does the same without any check
(``benchmarks/plain_rules.py``); the *Gram's limit* the larger of reading the updates and the share of one triangle,
``(K + 1) / 2K``, of the time of ``x @ x.T``.

Fishers: ``diagonal_fisher`` of a batch beside a *gradient*, forward and backward pass of the same batch, and beside the
fastest peer that is right (``benchmarks/peers.py``); with every instruction set that the processor has. Small networks:
a client's Fisher in the simulator beside its *gradient pass*, one step of SGD, on the same images, one thread.""",
    summary,
)


def judge(
    bench: Bench,
    name: str,
    size: tuple[int, int] | None,
    found: Comparison,
    yardstick: str,
    target: Target,
    parts: Mapping[str, float] | None = None,
) -> None:
    """A row on ours beside a yardstick, or by itself.

    Args:
        bench: What takes the row.
        name: What was measured.
        size: Clients and parameters of a round; None for what is no round.
        found: Times of ours, which come first, and of others.
        yardstick: Which of them ours are beside.
        target: What is to be reached.
        parts: Seconds, or shares, of the phases of ours.
    """
    ours = next(iter(found.times))
    own, other = found.times[ours], found.times[yardstick]
    value, low, high = target.measured(own, other)
    parts = parts or {}
    excess = target.excess(value)
    cells = {
        "ms": f"{1e3 * own.median:,.2f}",
        "measured": f"**{value:.2f}** ({low:.2f} to {high:.2f})",
        "of": "" if ours == yardstick else yardstick,
        "target": str(target),
        "verdict": verdict(excess, parts),
        "phases": shares(parts),
    }
    times = {each: found.times[each].seconds for each in (ours, yardstick)}
    add(bench, name, size, cells, {"excess": excess, "phases": dict(parts), "times": times}, found)


def add(
    bench: Bench,
    name: str,
    size: tuple[int, int] | None,
    cells: Mapping[str, str],
    figures: Mapping[str, Any],
    found: Comparison,
) -> None:
    """A row with these cells."""
    key, row = name, {"": name, **cells, "busy": found.busy}
    if size is not None:
        row |= {"K": str(size[0]), "P": f"{size[1]:,}"}
        key += f", K = {size[0]}, P = {size[1]:,}"
    row["rounds"] = str(len(next(iter(found.times.values())).seconds))
    bench.add(key, {column: row.get(column, "") for column in COLUMNS}, {**figures, "busy": found.busy})


def levels() -> tuple[str, list[str]]:
    """The instruction set that the kernels use, and the others that the processor has."""
    native = _native.module
    if native is None:
        return "", []
    return native.simd_level(), [level for level in native.cpu_features() if level != native.simd_level()]


def at_level(level: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with the kernels of another instruction set."""
    native = _native.module
    assert native is not None, "one of levels()"

    def other() -> None:
        before = native.simd_level()
        native.set_simd_level(level)
        try:
            run()
        finally:
            native.set_simd_level(before)

    return other
