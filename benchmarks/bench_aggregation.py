"""One round on the server: FDCR and FedAvg against a plain read of the same bytes and against PyTorch.

python -m pytest benchmarks/bench_aggregation.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Report, Times, interleave
from benchmarks.plain_rules import fdcr, relative_error
from benchmarks.rounds import FDCR_RULE as RULE
from benchmarks.rounds import fits, require_memory, stacked, stored, sum_of
from fdcr_fast import FedAvg, UpdateStore
from fdcr_fast.rules.fdcr.clustering import kmeans

PARAMS = 1_000_000
CLIENTS = (10, 100, 1000)
VECTOR = 4 * PARAMS  # bytes

REPORT = Report(
    "aggregation",
    "Aggregation",
    "python -m pytest benchmarks/bench_aggregation.py",
    f"""\
P = {PARAMS:,}, one client in ten an attacker, two-means. *of a raw read*: time of ``torch.sum``, a plain SIMD sum, over
as many bytes as updates and Fishers have (FedAvg: a store without Fishers) over ours, medians of interleaved repeats
in one process. *x published*: time of the algorithm as published, written in PyTorch on lists of float32 vectors, over
ours; *x stacked*: the same vectorised over ``[K, P]`` tensors; *x float32*: time of the store in float32 over the one
in bfloat16. *error*: the largest relative error in norm of the new parameters' step and of V, against float64.""",
)


# Updates and Fishers of all clients [K, L] over successive parameters, as often as asked.
Blocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def truth(w: Tensor, n: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """New parameters and V in float64; equation numbers as in the paper."""
    alpha = n / n.sum()
    low = torch.stack([fishers.amin(1) for _, fishers in blocks()]).amin(0).double().unsqueeze(1)
    high = torch.stack([fishers.amax(1) for _, fishers in blocks()]).amax(0).double().unsqueeze(1)

    def importance(fishers: Tensor) -> Tensor:
        return (fishers.double() - low).div_(high - low)  # 6

    V = torch.zeros(len(n), dtype=torch.float64)
    for updates, fishers in blocks():
        u = importance(fishers).mul_(updates)  # 8
        V += (alpha @ u - u).square_().sum(1)  # 9
    labels = kmeans(V)
    kept = torch.where(labels < labels.max(), n, 0)  # 10
    weights = kept / kept.sum()  # 11
    step = [weights @ importance(fishers).sigmoid_().mul_(2).mul_(updates) for updates, fishers in blocks()]  # 12
    return w + torch.cat(step), V / len(w)


def average(w: Tensor, n: Tensor, blocks: Blocks) -> Tensor:
    """FedAvg's parameters in float64."""
    return w + torch.cat([n / n.sum() @ updates.double() for updates, _ in blocks()])


def published(w: Tensor, updates: list[Tensor], fishers: list[Tensor], n: Tensor) -> tuple[Tensor, Tensor]:
    """Vector by vector, as one writes it down from the paper."""
    alpha = (n / n.sum()).tolist()
    importance = [(F - F.min()) / (F.max() - F.min()) for F in fishers]
    u_k = [delta * i for delta, i in zip(updates, importance, strict=True)]
    u = sum(a * x for a, x in zip(alpha, u_k, strict=True))
    V = torch.stack([((u - x) ** 2).mean() for x in u_k])
    labels = kmeans(V)
    kept = [k for k in range(len(n)) if labels[k] < labels.max()]
    total = sum(alpha[k] for k in kept)
    new = torch.zeros_like(w)
    for k in kept:
        new += alpha[k] / total * (w + 2 * torch.sigmoid(importance[k]) * updates[k])
    return new, V


def blocks_of(store: UpdateStore) -> Iterator[tuple[Tensor, Tensor]]:
    """A few tiles at a time, without the unused end of the last one; the updates twice where there are no Fishers."""
    step = 10_000 // store.tile
    for first in range(0, len(store.updates), step):
        end = min(step * store.tile, PARAMS - first * store.tile)
        matrices = (store.updates, store.updates if store.fishers is None else store.fishers)
        updates, fishers = (m[first : first + step].transpose(0, 1).flatten(1)[:, :end] for m in matrices)
        yield updates, fishers


def row(name: str, K: int, times: dict[str, Times], ours: str, raw: str, error: float) -> None:
    own, read = times[ours], times[raw]
    low, high = own.spread_over(read)
    peers = [peer for peer in ("published", "stacked", "float32") if peer in times]
    cells = {
        "": name,
        "K": str(K),
        "of a raw read": f"**{1 / own.over(read):.2f}** ({1 / high:.2f} to {1 / low:.2f})",
        **{f"x {peer}": f"{times[peer].over(own):.1f}" for peer in peers},
        "error": f"{error:.0e}",
        "rounds": str(len(own.seconds)),
    }
    shown = {ours, raw, *peers}
    REPORT.add(f"{name}, {K}", cells, {key: t.seconds for key, t in times.items() if key in shown})
    print("\n" + ", ".join(f"{k} {v}" for k, v in cells.items()))


@pytest.mark.parametrize("K", CLIENTS)
def test_store(K, seconds):
    require_memory(2.2 * K * VECTOR)
    w, n, store = stored(K, PARAMS)
    expected, V = truth(w, n, partial(blocks_of, store))
    result = RULE.aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    contenders = {"raw": sum_of(store), "FDCR": lambda: RULE.aggregate(w, store)}
    if fits(4.4 * K * VECTOR):  # its vectors, and as much again for what it computes from them
        updates, fishers = zip(*((c.update, c.fisher) for c in store), strict=True)
        contenders["published"] = partial(published, w, updates, fishers, n)
    row("FDCR, store", K, interleave(contenders, seconds), "FDCR", "raw", error)


@pytest.mark.parametrize("K", [10, 100])
def test_bfloat16_store(K, seconds):
    w, n, store = stored(K, PARAMS, torch.bfloat16)
    expected, V = truth(w, n, partial(blocks_of, store))
    result = RULE.aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    *_, wide = stored(K, PARAMS)
    times = interleave(
        {
            "raw": sum_of(store),
            "FDCR": lambda: RULE.aggregate(w, store),
            "float32": lambda: RULE.aggregate(w, wide),
        },
        seconds,
    )
    row("FDCR, bfloat16 store", K, times, "FDCR", "raw", error)


@pytest.mark.parametrize("K", CLIENTS)
def test_average(K, seconds):
    require_memory(1.2 * K * VECTOR)
    w, n, store = stored(K, PARAMS, with_fishers=False)
    error = relative_error(FedAvg().aggregate(w, store).params, average(w, n, partial(blocks_of, store)), w)
    assert error < 1e-6
    times = interleave({"raw": sum_of(store), "FedAvg": lambda: FedAvg().aggregate(w, store)}, seconds)
    row("FedAvg, store", K, times, "FedAvg", "raw", error)


@pytest.mark.parametrize("K", CLIENTS)
def test_tensors(K, seconds):
    require_memory(2 * K * VECTOR)
    w, n, updates, fishers = stacked(K, PARAMS)
    expected, V = truth(w, n, lambda: zip(updates.split(10_000, 1), fishers.split(10_000, 1), strict=True))
    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if fits(2.2 * K * VECTOR):
        contenders["published"] = partial(published, w, list(updates), list(fishers), n)
    if fits(4.2 * K * VECTOR):
        contenders["stacked"] = partial(fdcr, w, updates, fishers, n, kmeans)
    for contender in contenders.values():
        params, scores = contender()
        assert relative_error(params, expected, w) < 1e-3
        assert relative_error(scores, V) < 1e-3
    result = RULE.aggregate(w, updates, fishers, n)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    times = interleave(
        {
            "raw": lambda: (updates.sum(), fishers.sum()),
            "FDCR": lambda: RULE.aggregate(w, updates, fishers, n),
            **contenders,
        },
        seconds,
    )
    row("FDCR, tensors", K, times, "FDCR", "raw", error)
