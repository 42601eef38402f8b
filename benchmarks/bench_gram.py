"""All pairwise inner products of the clients against one matrix product of PyTorch on ready-made rows.

python -m pytest benchmarks/bench_gram.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tables import Report
from fdcr_fast import GramView, UpdateStore, estimate_gram, gram, grams

# (K, P)
SHAPES = [(20, 1_000_000), (200, 1_000_000), (1000, 100_000)]
SAMPLE = 50_000
VIEWS = [GramView("fisher_update"), GramView("fourth_root_fisher")]

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


# By name of the row: the call, with a store, updates and Fishers, and the transform of its inner products.
CASES: dict[str, tuple[Callable[..., Any], str | None]] = {
    "update": (lambda store, *x: gram(x[0]), "update"),
    "update, store": (lambda store, *x: gram(store), "update"),
    "update, float64": (lambda store, *x: gram(x[0], precision="float64"), "update"),
    "fisher_update": (lambda store, *x: gram(*x, transform="fisher_update"), "fisher_update"),
    "fourth_root_fisher": (lambda store, *x: gram(*x, transform="fourth_root_fisher"), "fourth_root_fisher"),
    "these two in one pass": (lambda store, *x: grams(*x, views=VIEWS), None),
    f"update, estimated from {SAMPLE:,}": (lambda store, *x: estimate_gram(x[0], sample=SAMPLE), None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_gram(bench, sized, K, P, name):
    K, P = sized(K, P)
    updates, fishers = uploads(K, P)
    store = UpdateStore(P, K)
    for update, fisher in zip(updates, fishers, strict=True):
        store.put(update, fisher, 1)
    call, transform = CASES[name]

    def ours() -> Any:
        return call(store, updates, fishers)

    def pytorch(transform: str) -> Tensor:
        x = transformed(updates, fishers, transform)
        return x @ x.t()

    contenders = {name: ours, "mm": lambda: pytorch("update")}
    found: dict[str, float] = {}
    if transform is not None:
        found = {
            "error": error(ours(), updates, fishers, transform),
            "mm error": error(pytorch(transform).double(), updates, fishers, transform),
        }
        assert found["error"] < 1e-5
        if transform != "update":
            contenders["PyTorch"] = lambda: pytorch(transform)
    times = bench.compare(contenders, share=0.3).times
    own, mm = times[name], times["mm"]
    low, high = own.spread_over(mm)
    cells = {
        "": name,
        "K": str(K),
        "P": f"{P:,}",
        "of mm": f"**{1 / own.over(mm):.2f}** ({1 / high:.2f} to {1 / low:.2f})",
        "rate": f"{(K + 1) / (2 * K) / own.over(mm):.2f}" if found else "",
        "of PyTorch": f"{times['PyTorch'].over(own):.2f}" if "PyTorch" in times else "",
        **{column: f"{value:.0e}" for column, value in found.items()},
        "rounds": str(len(own.seconds)),
    }
    bench.add(f"{name}, {K}", cells, {key: t.seconds for key, t in times.items()})
