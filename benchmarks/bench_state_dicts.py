"""State dicts in, a state dict out: FDCR against the published server code in plain PyTorch.

python -m pytest benchmarks/bench_state_dicts.py --threads 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_aggregation
from benchmarks.rounds import require_memory
from benchmarks.tables import Report
from fdcr_fast import FDCR, StateStore, aggregate_state_dicts
from fdcr_fast.rules.fdcr.clustering import kmeans

State = dict[str, Tensor]

# (K, P); a state has as many entries as that of a ResNet-18, of sizes that grow like its layers'.
SHAPES = [(10, 1_000_000), (50, 1_000_000), (10, 11_000_000), (50, 11_000_000)]
ENTRIES = 62

# Two-means on attackers that stand apart: the same clients are kept whatever the rounding of V.
RULE = FDCR(cluster="kmeans")

REPORT = Report(
    "state_dicts",
    "State dicts",
    "python -m pytest benchmarks/bench_state_dicts.py --threads 1",
    f"""\
FDCR on states of {ENTRIES} float32 tensors, one client in ten an attacker, two-means. *x published*: time of the
algorithm as published, written in PyTorch in loops over clients and entries of state dicts in float32, over ours,
medians of interleaved repeats in one process, with the quartiles of the ratios within repeats; *x vectors*: the same
written for one vector per client (``bench_aggregation.py``), concatenated first. *of a raw read*: time of ``torch.sum``
over all states and Fishers over ours. *at once*: ``aggregate_state_dicts``; *one by one*: a ``StateStore`` that is kept
from round to round, ``clear``, ``put_state`` of all clients and ``aggregate``. *put, of a copy*: time of
``Tensor.copy_`` of all states and Fishers into memory that was used before, over that of these ``put_state``.""",
)


def sizes(P: int) -> list[int]:
    """Of the entries, in all ``P``."""
    share = [1.1**i for i in range(ENTRIES)]
    size = [max(1, int(P * s / sum(share))) for s in share]
    return [*size[:-1], P - sum(size[:-1])]


def uploads(K: int, P: int) -> tuple[State, list[State], list[State], list[int]]:
    torch.manual_seed(0)
    w = {f"{i}.weight": 0.05 * torch.randn(n) for i, n in enumerate(sizes(P))}
    states, fishers = [], []
    for k in range(K):
        size = 0.1 if k % 10 == 0 else 0.01
        states.append({name: value + size * torch.randn(len(value)) for name, value in w.items()})
        fishers.append({name: torch.rand(len(value)) for name, value in w.items()})
    return w, states, fishers, [50 + k % 100 for k in range(K)]


def published(w: State, states: list[State], fishers: list[State], num_samples: list[int]) -> State:
    """Entry by entry, as one writes it down from the paper."""
    alpha = [n / sum(num_samples) for n in num_samples]
    importances, u_k = [], []
    for state, fisher in zip(states, fishers, strict=True):
        low = min(F.min() for F in fisher.values())
        high = max(F.max() for F in fisher.values())
        importance = {name: (F - low) / (high - low) for name, F in fisher.items()}
        importances.append(importance)
        u_k.append({name: (state[name] - w[name]) * importance[name] for name in w})
    u = {name: sum(a * x[name] for a, x in zip(alpha, u_k, strict=True)) for name in w}
    count = sum(value.numel() for value in w.values())
    V = torch.stack([sum(((u[name] - x[name]) ** 2).sum() for name in w) / count for x in u_k])
    labels = kmeans(V)
    kept = [k for k in range(len(states)) if labels[k] < labels.max()]
    total = sum(alpha[k] for k in kept)
    new = {name: torch.zeros_like(value) for name, value in w.items()}
    for k in kept:
        for name in w:
            step = 2 * torch.sigmoid(importances[k][name]) * (states[k][name] - w[name])
            new[name] += alpha[k] / total * (w[name] + step)
    return new


def by_vectors(w: State, states: list[State], fishers: list[State], num_samples: list[int]) -> State:
    """The same for one vector per client."""
    start, *vectors = (torch.cat(list(state.values())) for state in (w, *states))
    updates = [vector - start for vector in vectors]
    flat = [torch.cat(list(fisher.values())) for fisher in fishers]
    new, _ = bench_aggregation.published(start, updates, flat, torch.tensor(num_samples, dtype=torch.float64))
    return dict(zip(w, new.split([value.numel() for value in w.values()]), strict=True))


@pytest.mark.parametrize("name", ["at once", "one by one"])
@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_state_dicts(bench, sized, K, P, name):
    K, P = sized(K, P)
    require_memory(6 * 8 * K * P)  # the published algorithm's vectors, and what it computes from them
    w, states, fishers, num_samples = uploads(K, P)
    clients = [*states, *fishers]
    copies = [{name: torch.ones_like(value) for name, value in client.items()} for client in clients]
    store = StateStore(w, K)

    def put() -> None:
        store.clear(w)
        for k, (state, fisher) in enumerate(zip(states, fishers, strict=True)):
            store.put_state(state, fisher, num_samples[k], k)

    def one_by_one() -> State:
        put()
        return store.aggregate(RULE)[0]

    def copy() -> None:
        for client, to in zip(clients, copies, strict=True):
            for name, value in client.items():
                to[name].copy_(value)

    ours: dict[str, dict[str, Callable[[], Any]]] = {
        "at once": {"at once": lambda: aggregate_state_dicts(w, states, fishers, num_samples, rule=RULE)},
        "one by one": {"one by one": one_by_one, "put": put, "copy": copy},
    }
    contenders = ours[name] | {
        "published": lambda: published(w, states, fishers, num_samples),
        "vectors": lambda: by_vectors(w, states, fishers, num_samples),
        "raw": lambda: [value.sum() for client in clients for value in client.values()],
    }
    expected = contenders["published"]()
    for checked in ("vectors", name):
        for entry, value in contenders[checked]().items():
            torch.testing.assert_close(value, expected[entry], rtol=1e-4, atol=1e-6)
    times = bench.compare(contenders).times
    low, high = times["published"].spread_over(times[name])
    cells = {
        "": name,
        "K": str(K),
        "P": f"{P:,}",
        "ms": f"{times[name].median * 1e3:,.1f}",
        "x published": f"**{times['published'].over(times[name]):.1f}** ({low:.1f} to {high:.1f})",
        "x vectors": f"{times['vectors'].over(times[name]):.1f}",
        "of a raw read": f"{times['raw'].over(times[name]):.2f}",
        "put, of a copy": f"{times['copy'].over(times['put']):.2f}" if "put" in times else "",
        "rounds": str(len(times[name].seconds)),
    }
    bench.add(f"{name}, {K}, {P}", cells, {key: t.seconds for key, t in times.items()})
