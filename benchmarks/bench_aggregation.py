"""One round on the server: FDCR and FedAvg against a plain read of the same bytes and against PyTorch.

python -m pytest benchmarks/bench_aggregation.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Report, Times, interleave
from torch import Tensor

from fdcr_fast import FDCR, FedAvg, UpdateStore
from fdcr_fast.server.cluster import kmeans

PARAMS = 1_000_000
CLIENTS = (10, 100, 1000)

# Two-means on attackers that stand apart: the same clients are kept whatever the rounding of V.
RULE = FDCR(cluster="kmeans")

REPORT = Report(
    "aggregation",
    "Aggregation",
    "python -m pytest benchmarks/bench_aggregation.py",
    f"""\
P = {PARAMS:,}, float32, one client in ten an attacker, two-means. *of a raw read*: time of ``torch.sum`` over
a contiguous tensor of as many bytes as the updates and Fishers have (FedAvg: the updates) over ours, medians
of interleaved repeats in one process. *x published*: time of the algorithm as published, written in PyTorch
on lists of vectors, over ours; *x stacked*: the same vectorised over ``[K, P]`` tensors. *error*: the largest
relative error in norm of the new parameters' step and of V, against float64.""",
)


# Updates and Fishers of all clients [K, L] over successive parameters.
Blocks = list[tuple[Tensor, Tensor]]


def truth(w: Tensor, n: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """New parameters, V and FedAvg's parameters in float64; equation numbers as in the paper."""
    alpha = n / n.sum()
    low = torch.stack([fishers.amin(1) for _, fishers in blocks]).amin(0).double().unsqueeze(1)
    high = torch.stack([fishers.amax(1) for _, fishers in blocks]).amax(0).double().unsqueeze(1)

    def importance(fishers: Tensor) -> Tensor:
        return (fishers.double() - low).div_(high - low)  # 6

    V = torch.zeros(len(n), dtype=torch.float64)
    for updates, fishers in blocks:
        u = importance(fishers).mul_(updates)  # 8
        V += (alpha @ u - u).square_().sum(1)  # 9
    labels = kmeans(V)
    kept = torch.where(labels < labels.max(), n, 0)  # 10
    weights = kept / kept.sum()  # 11
    step = [weights @ importance(fishers).sigmoid_().mul_(2).mul_(updates) for updates, fishers in blocks]  # 12
    mean = [alpha @ updates.double() for updates, _ in blocks]
    return w + torch.cat(step), V / len(w), w + torch.cat(mean)


def uploads(K: int) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Global parameters, sample counts, and the update and Fisher of each client."""
    torch.manual_seed(0)
    w, direction = 0.05 * torch.randn(PARAMS), torch.randn(PARAMS)
    n = torch.randint(50, 150, (K,)).double()
    pairs = (
        (0.01 * torch.randn(PARAMS) + (0.1 * direction if k % 10 == 0 else 0), torch.rand(PARAMS)) for k in range(K)
    )
    return w, n, pairs


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


def stacked(w: Tensor, updates: Tensor, fishers: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """All clients at once, products with vectors where there are any."""
    alpha = (n / n.sum()).float()
    low, high = (f.unsqueeze(1) for f in fishers.aminmax(dim=1))
    importance = (fishers - low) / (high - low)
    u_k = importance * updates
    V = (alpha @ u_k - u_k).square_().mean(1)
    labels = kmeans(V)
    kept = torch.where(labels < labels.max(), n, 0)
    return w + (kept / kept.sum()).float() @ importance.sigmoid_().mul_(2).mul_(updates), V


def relative_error(value: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    return ((value.double() - expected).norm() / (expected - origin).norm()).item()


def available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def fits(K: int, copies: float) -> bool:
    """Whether so many copies of the updates fit into memory."""
    return copies * K * PARAMS * 4 < 0.9 * available_bytes()


def tiles(store: UpdateStore) -> Blocks:
    """Views of the tiles of a store, the last one without its unused end."""
    ends = [min(store.tile, PARAMS - t * store.tile) for t in range(len(store.updates))]
    pairs = zip(store.updates, store.fishers, ends, strict=True)
    return [(updates[:, :end], fishers[:, :end]) for updates, fishers, end in pairs]


def row(name: str, K: int, times: dict[str, Times], ours: str, raw: str, error: float) -> None:
    own, read = times[ours], times[raw]
    low, high = own.spread_over(read)
    peers = [peer for peer in ("published", "stacked") if peer in times]
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
    if not fits(K, 2):
        pytest.skip("not enough memory for the store")
    w, n, pairs = uploads(K)
    store = UpdateStore(PARAMS, K)
    store._data.zero_()  # the end of the last tile belongs to no parameter: no NaN for the raw read there
    for samples, (update, fisher) in zip(n.tolist(), pairs, strict=True):
        store.put(update, fisher, samples)
    expected, V, mean = truth(w, n, tiles(store))
    result, average = RULE.aggregate(w, store), FedAvg().aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    mean_error = relative_error(average.params, mean, w)
    assert max(error, mean_error) < 1e-5
    everything = store._data.view(-1)  # the very bytes
    times = interleave(
        {
            "raw": everything.sum,
            "FDCR": lambda: RULE.aggregate(w, store),
            "half raw": everything[: len(everything) // 2].sum,
            "FedAvg": lambda: FedAvg().aggregate(w, store),
        },
        seconds,
    )
    row("FDCR, store", K, times, "FDCR", "raw", error)
    row("FedAvg, store", K, times, "FedAvg", "half raw", mean_error)


@pytest.mark.parametrize("K", CLIENTS)
def test_tensors(K, seconds):
    if not fits(K, 2):
        pytest.skip("not enough memory for updates and Fishers")
    w, n, pairs = uploads(K)
    updates, fishers = torch.empty(2, K, PARAMS)
    for k, (update, fisher) in enumerate(pairs):
        updates[k], fishers[k] = update, fisher
    expected, V, _ = truth(w, n, list(zip(updates.split(10_000, 1), fishers.split(10_000, 1), strict=True)))
    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if fits(K, 2.2):
        contenders["published"] = partial(published, w, list(updates), list(fishers), n)
    if fits(K, 3.2):
        contenders["stacked"] = partial(stacked, w, updates, fishers, n)
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
