"""Rounds that several benchmarks measure: the clients' uploads in a store or in tensors, if there is memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import SkipTest

import torch
from torch import Tensor

from fdcr_fast import FDCR, UpdateStore
from fdcr_fast.memory import available_memory, giga

# Two-means on attackers that stand apart: the same clients are kept whatever the rounding of V.
FDCR_RULE = FDCR(cluster="kmeans")


def uploads(K: int, P: int) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Global parameters, sample counts, and the update and Fisher of each client; one in ten is an attacker."""
    torch.manual_seed(0)
    w, direction = 0.05 * torch.randn(P), torch.randn(P)
    n = torch.randint(50, 150, (K,)).double()
    pairs = ((0.01 * torch.randn(P) + (0.1 * direction if k % 10 == 0 else 0), torch.rand(P)) for k in range(K))
    return w, n, pairs


def stored(
    K: int, P: int, dtype: torch.dtype = torch.float32, *, with_fishers: bool = True
) -> tuple[Tensor, Tensor, UpdateStore]:
    w, n, pairs = uploads(K, P)
    store = UpdateStore(P, K, dtype, with_fishers=with_fishers)
    for samples, (update, fisher) in zip(n.tolist(), pairs, strict=True):
        store.put(update, fisher if with_fishers else None, samples)
    return w, n, store


def stacked(K: int, P: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global parameters, sample counts, updates and Fishers ``[K, P]``."""
    w, n, pairs = uploads(K, P)
    updates, fishers = torch.empty(2, K, P)
    for k, (update, fisher) in enumerate(pairs):
        updates[k], fishers[k] = update, fisher
    return w, n, updates, fishers


def filled(store: UpdateStore, n: Tensor, updates: Tensor, fishers: Tensor) -> UpdateStore:
    """The store with the clients of tensors."""
    for update, fisher, samples in zip(updates, fishers, n.tolist(), strict=True):
        store.put(update, fisher, samples)
    return store


def sum_of(store: UpdateStore, numbers: int | None = None) -> Callable[[], Tensor]:
    """Reads all bytes of the store, or those of its first numbers, as float32 whatever they are.

    NaN costs a sum no time.
    """
    everything = torch.as_strided(store.updates, (store.nbytes // store.dtype.itemsize,), (1,), 0)
    return everything[:numbers].view(torch.float32).sum


def name_of(size: tuple[int, int]) -> str:
    """Of a round of so many clients and parameters, in the names of benchmarks."""
    return "{}x{}".format(*size)


def fits(nbytes: float) -> bool:
    """Whether so much fits into the memory that is left."""
    available = available_memory()
    return available is None or nbytes < 0.9 * available


def require_memory(nbytes: float) -> None:
    """Skip the test that calls it unless so much fits into the memory that is left."""
    if not fits(nbytes):
        raise SkipTest(f"it takes {giga(int(nbytes))} of memory, and {giga(available_memory() or 0)} are left")
