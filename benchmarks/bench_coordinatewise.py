"""Medians and trimmed means of every parameter against PyTorch along the clients.

python -m pytest benchmarks/bench_coordinatewise.py
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.tables import Report
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


@pytest.mark.parametrize("source", ["tensors", "store"])
@pytest.mark.parametrize("name", ["median", "trimmed mean"])
@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_coordinatewise(bench, sized, K, P, name, source):
    K, P = sized(K, P)
    torch.manual_seed(0)
    updates, w, f = torch.randn(K, P), torch.zeros(P), int(0.3 * K)
    rule, pytorch = {
        "median": (CoordinateMedian(), lambda: updates.median(0)),
        "trimmed mean": (TrimmedMean(num_byzantine=f), lambda: updates.sort(0).values[f : K - f].mean(0)),
    }[name]
    store = UpdateStore(P, K, with_fishers=False)
    for update in updates:
        store.put(update, None, 1)
    ours = {
        "tensors": lambda: rule.aggregate(w, updates, None, [1] * K),
        "store": lambda: rule.aggregate(w, store),
    }[source]
    times = bench.compare({"ours": ours, "PyTorch": pytorch}, share=0.3).times
    own, peer = times["ours"], times["PyTorch"]
    low, high = peer.spread_over(own)
    label = name if source == "tensors" else f"{name}, store"
    ratio = f"**{peer.over(own):.1f}** ({low:.1f} to {high:.1f})"
    cells = {"": label, "K": str(K), "P": f"{P:,}", "of PyTorch": ratio}
    bench.add(f"{label}, {K}", cells, {key: t.seconds for key, t in times.items()})
