"""Every rule of the server, from a store in memory and from tensors, for rounds of all sizes.

python -m pytest benchmarks/bench_rules.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fdcr_fast
from benchmarks.rounds import name_of
from benchmarks.rules import ATTACKERS, RULES
from benchmarks.tables import Report
from fdcr_fast import AggregationRule, UpdateStore

# (K, P): a toy, the paper's CNN, ResNet-18, and rounds of many clients
SHAPES = [(10, 5_000), (10, 431_080), (20, 11_000_000), (100, 1_000_000), (1000, 100_000)]

REPORT = Report(
    "rules",
    "Rules",
    "python -m pytest benchmarks/bench_rules.py",
    """\
Milliseconds of ``rule.aggregate`` with all its checks, for rounds in float32 that come from a store in memory with
Fishers, or from ``[K, P]`` tensors; one client in five an attacker, default options. *store/tensors*: ratio of the
medians of interleaved repeats in one process, with the quartiles of the ratios within repeats.""",
)


class Round(NamedTuple):
    w: Tensor
    updates: Tensor
    fishers: Tensor
    num_samples: list[int]
    store: UpdateStore


@pytest.fixture(scope="module", params=SHAPES, ids=name_of)
def round_(request: pytest.FixtureRequest, sized: Callable[[int, int], tuple[int, int]]) -> Round:
    K, P = sized(*request.param)
    torch.manual_seed(0)
    w, direction = 0.05 * torch.randn(P), 0.01 * torch.randn(P)
    updates, fishers = torch.empty(2, K, P)
    num_samples = [50 + k % 100 for k in range(K)]
    store = UpdateStore(P, K)
    for k in range(K):
        updates[k].normal_(0, 0.01)
        fishers[k].uniform_()
        if k < ATTACKERS * K:
            updates[k] += direction
        store.put(updates[k], fishers[k], num_samples[k])
    return Round(w, updates, fishers, num_samples, store)


def test_the_table_has_every_rule():
    exported = {x for x in vars(fdcr_fast).values() if isinstance(x, type) and issubclass(x, AggregationRule)}
    assert {type(make(1)) for make in RULES.values()} == exported - {AggregationRule}


@pytest.mark.parametrize("name", RULES)
def test_rules(bench, round_, name):
    w, updates, fishers, num_samples, store = round_
    K, P = updates.shape
    rule = RULES[name](int(ATTACKERS * K))
    assert torch.equal(
        rule.aggregate(w, store).kept,
        rule.aggregate(w, updates, fishers, num_samples).kept,
    )
    contenders = {
        "store": lambda: rule.aggregate(w, store),
        "tensors": lambda: rule.aggregate(w, updates, fishers, num_samples),
    }
    times = bench.compare(contenders, share=0.1).times
    ratio = times["store"].over(times["tensors"])
    low, high = times["store"].spread_over(times["tensors"])
    cells = {
        "rule": name,
        "K": str(K),
        "P": f"{P:,}",
        "store, ms": f"{times['store'].median * 1e3:,.2f}",
        "tensors, ms": f"{times['tensors'].median * 1e3:,.2f}",
        "store/tensors": f"**{ratio:.2f}** ({low:.2f} to {high:.2f})",
        "rounds": str(len(times["store"].seconds)),
    }
    bench.add(f"{name}, {K}, {P}", cells, {key: t.seconds for key, t in times.items()})
