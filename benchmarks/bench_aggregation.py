"""One round on the server: FDCR and FedAvg against a plain read of the same bytes and against PyTorch.

python -m pytest benchmarks/bench_aggregation.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Times
from benchmarks.plain_rules import fdcr, relative_error
from benchmarks.rounds import FDCR_RULE as RULE
from benchmarks.rounds import fits, require_memory, stacked, stored, sum_of
from benchmarks.tables import Report
from fdcr_fast import FedAvg, UpdateStore
from fdcr_fast.rules.fdcr.clustering import kmeans

PARAMS = 1_000_000
CLIENTS = (10, 100, 1000)
NUMBER = 4  # bytes of a float32

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


def blocks_of(store: UpdateStore, P: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A few tiles at a time, without the unused end of the last one; the updates twice where there are no Fishers."""
    step = 10_000 // store.tile
    for first in range(0, len(store.updates), step):
        end = min(step * store.tile, P - first * store.tile)
        matrices = (store.updates, store.updates if store.fishers is None else store.fishers)
        updates, fishers = (m[first : first + step].transpose(0, 1).flatten(1)[:, :end] for m in matrices)
        yield updates, fishers


def row(bench: Bench, name: str, K: int, times: dict[str, Times], error: float) -> None:
    """Of times of ours, which come first, of a raw read, and of peers."""
    ours = next(iter(times))
    own, read = times[ours], times["raw"]
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
    bench.add(f"{name}, {K}", cells, {key: t.seconds for key, t in times.items()})


@pytest.mark.parametrize("K", CLIENTS)
def test_store(bench, sized, K):
    K, P = sized(K, PARAMS)
    require_memory(2.2 * K * P * NUMBER)
    w, n, store = stored(K, P)
    expected, V = truth(w, n, partial(blocks_of, store, P))
    result = RULE.aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    contenders = {"FDCR": lambda: RULE.aggregate(w, store), "raw": sum_of(store)}
    if fits(4.4 * K * P * NUMBER):  # its vectors, and as much again for what it computes from them
        updates, fishers = zip(*((c.update, c.fisher) for c in store), strict=True)
        contenders["published"] = partial(published, w, updates, fishers, n)
    row(bench, "FDCR, store", K, bench.compare(contenders).times, error)


@pytest.mark.parametrize("K", [10, 100])
def test_bfloat16_store(bench, sized, K):
    K, P = sized(K, PARAMS)
    w, n, store = stored(K, P, torch.bfloat16)
    expected, V = truth(w, n, partial(blocks_of, store, P))
    result = RULE.aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    *_, wide = stored(K, P)
    contenders = {
        "FDCR": lambda: RULE.aggregate(w, store),
        "raw": sum_of(store),
        "float32": lambda: RULE.aggregate(w, wide),
    }
    row(bench, "FDCR, bfloat16 store", K, bench.compare(contenders).times, error)


@pytest.mark.parametrize("K", CLIENTS)
def test_average(bench, sized, K):
    K, P = sized(K, PARAMS)
    require_memory(1.2 * K * P * NUMBER)
    w, n, store = stored(K, P, with_fishers=False)
    error = relative_error(FedAvg().aggregate(w, store).params, average(w, n, partial(blocks_of, store, P)), w)
    assert error < 1e-6
    contenders = {"FedAvg": lambda: FedAvg().aggregate(w, store), "raw": sum_of(store)}
    row(bench, "FedAvg, store", K, bench.compare(contenders).times, error)


@pytest.mark.parametrize("K", CLIENTS)
def test_tensors(bench, sized, K):
    K, P = sized(K, PARAMS)
    require_memory(2 * K * P * NUMBER)
    w, n, updates, fishers = stacked(K, P)
    expected, V = truth(w, n, lambda: zip(updates.split(10_000, 1), fishers.split(10_000, 1), strict=True))
    peers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if fits(2.2 * K * P * NUMBER):
        peers["published"] = partial(published, w, list(updates), list(fishers), n)
    if fits(4.2 * K * P * NUMBER):
        peers["stacked"] = partial(fdcr, w, updates, fishers, n, kmeans)
    for peer in peers.values():
        params, scores = peer()
        assert relative_error(params, expected, w) < 1e-3
        assert relative_error(scores, V) < 1e-3
    result = RULE.aggregate(w, updates, fishers, n)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    contenders = {
        "FDCR": lambda: RULE.aggregate(w, updates, fishers, n),
        "raw": lambda: (updates.sum(), fishers.sum()),
        **peers,
    }
    row(bench, "FDCR, tensors", K, bench.compare(contenders).times, error)
