"""State dicts in, a state dict out: FDCR against the steps of the published server in plain PyTorch.

python -m pytest benchmarks/bench_state_dicts.py --threads 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.rounds import require_memory
from benchmarks.tables import Report
from fdcr_fast import FDCR, StateStore, aggregate_state_dicts
from fdcr_fast.rules.fdcr.clustering import kmeans

State = dict[str, Tensor]

# (K, P); a state has as many entries as that of a ResNet-18, of sizes that grow like its layers'.
SHAPES = [(10, 1_000_000), (50, 1_000_000), (10, 11_000_000), (50, 11_000_000)]
ENTRIES = 62

# Two-means on attackers that stand apart: the same clients are kept whatever the rounding of V, and by distances.
RULE = FDCR(cluster="kmeans")

REPORT = Report(
    "state_dicts",
    "State dicts",
    "python -m pytest benchmarks/bench_state_dicts.py --threads 1",
    f"""\
FDCR on states of {ENTRIES} float32 tensors, one client in ten an attacker, two-means. *x published*: time of the steps
of the published server in float32 over ours, medians of interleaved repeats in one process, with the quartiles of the
ratios within repeats: the states are concatenated to vectors, which the discrepancies come from, rescaled entry by
entry, and averaged entry by entry (left out, in its favour, are its copies of models and a mean that it does not use).
*x entry loop*: the same for the leanest loops over clients and entries that we could write. *of a raw read*: time of
``torch.sum`` over all states and Fishers over ours. *at once*: ``aggregate_state_dicts``; *one by one*: a
``StateStore`` that is kept from round to round, ``clear``, ``put_state`` of all clients and ``aggregate``. *put, of a
copy*: time of ``Tensor.copy_`` of all states and Fishers into memory that was used before, over that of these
``put_state``.""",
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


def flat(state: State) -> Tensor:
    """The entries in one vector."""
    return torch.cat([value.view(-1) for value in state.values()])


def kept_clients(V: list[Tensor]) -> list[int]:
    """By two-means."""
    labels = kmeans(torch.stack(V).double())
    return [k for k in range(len(V)) if labels[k] < labels.max()]


def published(w: State, states: list[State], fishers: list[State], num_samples: list[int]) -> State:
    """The steps of the published server."""
    alpha = [n / sum(num_samples) for n in num_samples]
    start, vectors, fisher_vectors = flat(w), [flat(state) for state in states], [flat(F) for F in fishers]
    importances = [(F - F.min()) / (F.max() - F.min()) for F in fisher_vectors]
    u_k = [(start - vector) * importance for vector, importance in zip(vectors, importances, strict=True)]
    u = torch.zeros_like(start)
    for a, x in zip(alpha, u_k, strict=True):
        u += a * x
    kept = kept_clients([nn.functional.pairwise_distance(x[None], u[None])[0] for x in u_k])
    total = sum(alpha[k] for k in kept)
    new: State = {}
    for k in kept:
        begin, rescaled = 0, {}
        for name, value in states[k].items():
            importance = importances[k][begin : begin + value.numel()].reshape(value.shape)
            rescaled[name] = w[name] - (w[name] - value) * (torch.sigmoid(importance) * 2)
            begin += value.numel()
        for name, value in rescaled.items():
            if name in new:
                new[name] += value * (alpha[k] / total)
            else:
                new[name] = value * (alpha[k] / total)
    return new


def entry_loop(w: State, states: list[State], fishers: list[State], num_samples: list[int]) -> State:
    """Entry by entry, which concatenates nothing."""
    alpha = [n / sum(num_samples) for n in num_samples]
    importances, u_k = [], []
    for state, fisher in zip(states, fishers, strict=True):
        low = min(F.min() for F in fisher.values())
        high = max(F.max() for F in fisher.values())
        importance = {name: (F - low) / (high - low) for name, F in fisher.items()}
        importances.append(importance)
        u_k.append({name: (state[name] - w[name]) * importance[name] for name in w})
    u = {name: sum(a * x[name] for a, x in zip(alpha, u_k, strict=True)) for name in w}
    kept = kept_clients([sum(((u[name] - x[name]) ** 2).sum() for name in w) for x in u_k])
    total = sum(alpha[k] for k in kept)
    new = {name: torch.zeros_like(value) for name, value in w.items()}
    for k in kept:
        for name in w:
            step = 2 * torch.sigmoid(importances[k][name]) * (states[k][name] - w[name])
            new[name] += alpha[k] / total * (w[name] + step)
    return new


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
        "entry loop": lambda: entry_loop(w, states, fishers, num_samples),
        "raw": lambda: [value.sum() for client in clients for value in client.values()],
    }
    expected = contenders["published"]()
    for checked in ("entry loop", name):
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
        "x entry loop": f"{times['entry loop'].over(times[name]):.1f}",
        "of a raw read": f"{times['raw'].over(times[name]):.2f}",
        "put, of a copy": f"{times['copy'].over(times['put']):.2f}" if "put" in times else "",
        "rounds": str(len(times[name].seconds)),
    }
    bench.add(f"{name}, {K}, {P}", cells, {key: t.seconds for key, t in times.items()})
