"""One round on the server: FDCR and FedAvg against a plain read of the same bytes and against PyTorch.

python -m pytest benchmarks/bench_aggregation.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def clients(K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global parameters, updates, Fishers and sample counts."""
    torch.manual_seed(0)
    w, direction = 0.05 * torch.randn(PARAMS), torch.randn(PARAMS)
    updates = torch.empty(K, PARAMS).normal_().mul_(0.01)
    for k in range(0, K, 10):
        updates[k] += 0.1 * direction
    return w, updates, torch.empty(K, PARAMS).exponential_(), torch.randint(50, 150, (K,)).double()


def truth(w: Tensor, updates: Tensor, fishers: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New parameters, V and FedAvg's parameters in float64; equation numbers as in the paper."""
    alpha = n / n.sum()
    low, high = (f.double().unsqueeze(1) for f in fishers.aminmax(dim=1))
    V = torch.zeros(len(n), dtype=torch.float64)
    blocks = [slice(start, start + 20_000) for start in range(0, PARAMS, 20_000)]
    for block in blocks:
        u = (fishers[:, block].double() - low).div_(high - low).mul_(updates[:, block])  # 6, 8
        V += (alpha @ u - u).square_().sum(1)  # 9
    V /= PARAMS
    labels = kmeans(V)
    kept = torch.where(labels < labels.max(), n, 0)  # 10
    weights = kept / kept.sum()  # 11
    step, plain = torch.empty(2, PARAMS, dtype=torch.float64)
    for block in blocks:
        importance = (fishers[:, block].double() - low).div_(high - low)
        step[block] = weights @ importance.sigmoid_().mul_(2).mul_(updates[:, block])  # 12
        plain[block] = alpha @ updates[:, block].double()
    return w + step, V, w + plain


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


def needs_copies(K: int, copies: float) -> None:
    """Skips unless ``copies`` of the updates fit into memory."""
    needed = copies * K * PARAMS * 4
    if needed > 0.9 * available_bytes():
        pytest.skip(f"needs {needed / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are available")


def filled_store(updates: Tensor, fishers: Tensor, n: Tensor) -> UpdateStore:
    store = UpdateStore(PARAMS, len(n))
    for k, samples in enumerate(n.tolist()):
        store.put(updates[k], fishers[k], samples, client_id=k)
    return store


def row(name: str, K: int, times: dict[str, Times], ours: str, raw: str, error: float) -> None:
    own, read = times[ours], times[raw]
    low, high = own.spread_over(read)
    cells = {
        "": name,
        "K": str(K),
        "of a raw read": f"**{1 / own.over(read):.2f}** ({1 / high:.2f} to {1 / low:.2f})",
        **{f"x {peer}": f"{times[peer].over(own):.1f}" for peer in ("published", "stacked") if peer in times},
        "error": f"{error:.0e}",
        "rounds": str(len(own.seconds)),
    }
    REPORT.add(f"{name}, {K}", cells, {key: t.seconds for key, t in times.items()})
    print("\n" + ", ".join(f"{k} {v}" for k, v in cells.items()))


@pytest.mark.parametrize("K", CLIENTS)
def test_store(K, seconds):
    needs_copies(K, 4.2)
    w, updates, fishers, n = clients(K)
    expected, V, mean = truth(w, updates, fishers, n)
    store = filled_store(updates, fishers, n)
    del updates, fishers
    result, average = RULE.aggregate(w, store), FedAvg().aggregate(w, store)
    error = max(relative_error(result.params, expected, w), relative_error(result.discrepancy, V))
    assert error < 1e-5
    assert relative_error(average.params, mean, w) < 1e-5
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
    row("FedAvg, store", K, times, "FedAvg", "half raw", relative_error(average.params, mean, w))


@pytest.mark.parametrize("K", CLIENTS)
def test_tensors(K, seconds):
    needs_copies(K, 2.1)
    w, updates, fishers, n = clients(K)
    expected, V, _ = truth(w, updates, fishers, n)
    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if 3 * updates.nbytes < 0.9 * available_bytes():
        contenders["published"] = partial(published, w, list(updates), list(fishers), n)
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
