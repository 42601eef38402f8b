"""Medians and trimmed means of every parameter against PyTorch along the clients.

python -m pytest benchmarks/bench_coordinatewise.py
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import Report, interleave
from fdcr_fast import CoordinateMedian, TrimmedMean, UpdateStore

# (K, P)
SHAPES = [(10, 1_000_000), (100, 100_000), (1000, 10_000)]

REPORT = Report(
    "coordinatewise",
    "Coordinate-wise rules",
    "python -m pytest benchmarks/bench_coordinatewise.py",
    """\
*of PyTorch*: time of ``updates.median(0)``, or of ``updates.sort(0)`` and the mean of the middle rows, over that of
``rule.aggregate`` with all its checks; medians of interleaved repeats in one process.""",
)


@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_coordinatewise(K, P, seconds):
    torch.manual_seed(0)
    updates, w, f = torch.randn(K, P), torch.zeros(P), int(0.3 * K)
    store = UpdateStore(P, K, with_fishers=False)
    for update in updates:
        store.put(update, None, 1)
    median, trimmed = CoordinateMedian(), TrimmedMean(num_byzantine=f)
    times = interleave(
        {
            "torch.median": lambda: updates.median(0),
            "torch.sort": lambda: updates.sort(0).values[f : K - f].mean(0),
            "median": lambda: median.aggregate(w, updates, None, [1] * K),
            "median, store": lambda: median.aggregate(w, store),
            "trimmed mean": lambda: trimmed.aggregate(w, updates, None, [1] * K),
            "trimmed mean, store": lambda: trimmed.aggregate(w, store),
        },
        seconds,
    )
    for name in list(times)[2:]:
        peer = times["torch.median" if name.startswith("median") else "torch.sort"]
        low, high = peer.spread_over(times[name])
        ratio = f"**{peer.over(times[name]):.1f}** ({low:.1f} to {high:.1f})"
        cells = {"": name, "K": str(K), "P": f"{P:,}", "of PyTorch": ratio}
        REPORT.add(f"{name}, {K}", cells, {"ours": times[name].seconds, "PyTorch": peer.seconds})
        print("\n" + ", ".join(f"{k} {v}" for k, v in cells.items()))
