"""Which training image belongs to which client: every image to exactly one."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.sim.data import Dataset
from fdcr_fast.sim.seeding import numpy_generator

MAX_DRAWS = 10


@dataclass(frozen=True)
class PartitionOptions:
    """What a partition may depend on."""

    clients: int
    min_samples: int
    beta: float
    seed: int


def dirichlet(dataset: Dataset, options: PartitionOptions) -> list[Tensor]:
    """Split each class over the clients with shares drawn from a symmetric Dirichlet distribution.

    For class ``c``: ``p ~ Dir(beta, ..., beta)`` over the clients, client ``k`` gets the share ``p_k`` of the
    images of ``c``. Small ``beta`` is heterogeneous, large ``beta`` near uniform. If a client gets fewer than
    ``min_samples``, everything is drawn again, at most ``MAX_DRAWS`` times; then images move from whoever has
    most to those that have too few.
    """
    labels = dataset.train_labels.numpy()
    classes = [np.flatnonzero(labels == label) for label in range(dataset.num_classes)]
    rng = numpy_generator(options.seed, "dirichlet")
    for _ in range(MAX_DRAWS):
        parts: list[list[int]] = [[] for _ in range(options.clients)]
        for members in classes:
            shares = rng.dirichlet(np.full(options.clients, options.beta))
            cuts = (shares.cumsum()[:-1] * len(members)).round().astype(np.int64)
            for part, piece in zip(parts, np.split(rng.permutation(members), cuts), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= options.min_samples:
            break
    else:
        _level(parts, options.min_samples, rng)
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in parts]


def _level(parts: list[list[int]], min_samples: int, rng: np.random.Generator) -> None:
    """Move images, in place, from the richest clients to those below the minimum."""
    richest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(richest)
    for poor in parts:
        while len(poor) < min_samples:
            # The total suffices, so whoever has most has more than the minimum and is not this client.
            size, client = heapq.heappop(richest)
            if -size != len(parts[client]):
                heapq.heappush(richest, (-len(parts[client]), client))
                continue
            rich = parts[client]
            poor.append(rich.pop(int(rng.integers(len(rich)))))
            heapq.heappush(richest, (-len(rich), client))


def by_writer(dataset: Dataset, options: PartitionOptions) -> list[Tensor]:
    """Writer ``w`` belongs to client ``w mod K``, so that no hand is spread over two clients.

    Raises:
        ValueError: the data set does not say who wrote what, or has fewer writers than there are clients.
    """
    if dataset.writers is None:
        raise ValueError("split: only the digits data set knows its writers, choose dirichlet")
    num_writers = int(dataset.writers.max()) + 1
    if options.clients > num_writers:
        raise ValueError(f"split: {num_writers} writers are too few for {options.clients} clients")
    owner = dataset.writers % options.clients
    return [torch.nonzero(owner == client).squeeze(1) for client in range(options.clients)]


PARTITIONS: dict[str, Callable[[Dataset, PartitionOptions], list[Tensor]]] = {
    "dirichlet": dirichlet,
    "writer": by_writer,
}


def partition(split: str, dataset: Dataset, options: PartitionOptions) -> list[Tensor]:
    """Sorted indices of each client's training images.

    Raises:
        ValueError: the images do not suffice for the minimum per client.
    """
    available = len(dataset.train_labels)
    if available < options.clients * options.min_samples:
        raise ValueError(
            f"clients: {options.clients} clients with at least {options.min_samples} samples each need "
            f"{options.clients * options.min_samples} training images, there are {available}"
        )
    parts = PARTITIONS[split](dataset, options)
    poorest = min(range(len(parts)), key=lambda client: len(parts[client]))
    if len(parts[poorest]) < options.min_samples:
        raise ValueError(
            f"split: client {poorest} has {len(parts[poorest])} training images, expected at least "
            f"{options.min_samples}"
        )
    return parts
