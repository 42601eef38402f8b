"""All pairwise inner products of the clients against one matrix product of PyTorch on ready-made rows.

python -m pytest benchmarks/bench_gram.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Report, Times, interleave
from fdcr_fast import GramView, UpdateStore, estimate_gram, gram, grams

# (K, P)
SHAPES = [(20, 1_000_000), (200, 1_000_000), (1000, 100_000)]
SAMPLE = 50_000

REPORT = Report(
    "gram",
    "Gram matrices",
    "python -m pytest benchmarks/bench_gram.py",
    """\
*of mm*: time of ``x @ x.T`` (float32, PyTorch, rows ready-made in memory) over ours, medians of interleaved repeats in
one process. That product computes all ``2 K^2 P`` operations, ours the ``K (K + 1) P`` of one triangle: *rate* is ours
over its rate, each by its own operations. *of PyTorch*: time of transforming the rows in PyTorch and of ``x @ x.T``
over ours. *error*: the largest difference from float64, over ``|x_i| |x_j|``; *mm error*: the same of ``x @ x.T``.""",
)


def uploads(K: int, P: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    updates, fishers = torch.empty(2, K, P)
    for k in range(K):
        torch.randn(P, out=updates[k]).mul_(0.01)
        torch.rand(P, out=fishers[k]).pow_(8)
    return updates, fishers


def transformed(updates: Tensor, fishers: Tensor, transform: str) -> Tensor:
    return {
        "update": lambda: updates,
        "fisher_update": lambda: fishers.sqrt() * updates,
        "fourth_root_fisher": lambda: fishers.sqrt().sqrt(),
    }[transform]()


def error(G: Tensor, updates: Tensor, fishers: Tensor, transform: str) -> float:
    exact = torch.zeros(len(G), len(G), dtype=torch.float64)
    for u, f in zip(updates.split(10_000, 1), fishers.split(10_000, 1), strict=True):
        x = transformed(u.double(), f.double(), transform)
        exact += x @ x.t()
    size = exact.diagonal().sqrt()
    return ((G - exact).abs() / (size * size[:, None])).max().item()


def row(
    name: str, K: int, P: int, times: dict[str, Times], ours: str, peer: str | None, found: dict[str, float]
) -> None:
    own, mm = times[ours], times["mm"]
    low, high = own.spread_over(mm)
    cells = {
        "": name,
        "K": str(K),
        "P": f"{P:,}",
        "of mm": f"**{1 / own.over(mm):.2f}** ({1 / high:.2f} to {1 / low:.2f})",
        "rate": f"{(K + 1) / (2 * K) / own.over(mm):.2f}" if found else "",
        "of PyTorch": "" if peer is None else f"{times[peer].over(own):.2f}",
        **{column: f"{value:.0e}" for column, value in found.items()},
        "rounds": str(len(own.seconds)),
    }
    shown = {"mm", ours, peer or "mm"}
    REPORT.add(f"{name}, {K}", cells, {key: t.seconds for key, t in times.items() if key in shown})
    print("\n" + ", ".join(f"{k} {v}" for k, v in cells.items()))


@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_gram(K, P, seconds):
    updates, fishers = uploads(K, P)
    store = UpdateStore(P, K)
    for update, fisher in zip(updates, fishers, strict=True):
        store.put(update, fisher, 1)

    def pytorch(transform: str) -> Tensor:
        x = transformed(updates, fishers, transform)
        return x @ x.t()

    views = [GramView("fisher_update"), GramView("fourth_root_fisher")]
    rows = {
        "update": (lambda: gram(updates), "mm", "update"),
        "update, store": (lambda: gram(store), "mm", "update"),
        "update, float64": (lambda: gram(updates, precision="float64"), "mm", "update"),
        "fisher_update": (
            lambda: gram(updates, fishers, transform="fisher_update"),
            "PyTorch fisher_update",
            "fisher_update",
        ),
        "fourth_root_fisher": (
            lambda: gram(updates, fishers, transform="fourth_root_fisher"),
            "PyTorch fourth_root_fisher",
            "fourth_root_fisher",
        ),
        "these two in one pass": (lambda: grams(updates, fishers, views=views), None, None),
        f"update, estimated from {SAMPLE:,}": (lambda: estimate_gram(updates, sample=SAMPLE), None, None),
    }
    peers = {
        "mm": lambda: pytorch("update"),
        "PyTorch fisher_update": lambda: pytorch("fisher_update"),
        "PyTorch fourth_root_fisher": lambda: pytorch("fourth_root_fisher"),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in rows}
    for name, (ours, peer, transform) in rows.items():
        if transform is not None and peer is not None:
            found[name] = {
                "error": error(ours(), updates, fishers, transform),
                "mm error": error(peers[peer]().double(), updates, fishers, transform),
            }
            assert found[name]["error"] < 1e-5
    times = interleave({**peers, **{name: ours for name, (ours, _, _) in rows.items()}}, seconds)
    for name, (_, peer, _) in rows.items():
        row(name, K, P, times, name, None if peer == "mm" else peer, found[name])
