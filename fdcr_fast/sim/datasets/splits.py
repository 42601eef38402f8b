"""How training images are dealt to clients, by name."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.partition import Dealt, Drawn, Partition, PartitionOptions
from fdcr_fast.sim.seeding import numpy_generator

MAX_DRAWS = 10


def dirichlet_mix(dataset: Dataset, options: PartitionOptions) -> Drawn:
    """Client ``k`` draws ``p_k ~ Dir(beta, ..., beta)`` over the classes, and ``samples_per_client`` images from it.

    Each image is of a class drawn from ``p_k``, and any image of that class alike: the number of clients is not
    limited by that of the images, and the images of a few are remembered at a time.

    Raises:
        ValueError: the number of samples is not given.
    """
    if options.samples_per_client is None:
        raise ValueError("split: dirichlet-mix needs samples_per_client")
    labels = dataset.train_labels.numpy()
    counts = np.bincount(labels)
    starts = np.concatenate([[0], counts[counts > 0].cumsum()])
    return Drawn(np.argsort(labels, kind="stable"), starts, options)


def dirichlet(dataset: Dataset, options: PartitionOptions) -> Dealt:
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
        dealt: list[tuple[NDArray[Any], NDArray[Any]]] = []  # images in the order in which they are dealt, and to whom
        for members in classes:
            shares = rng.dirichlet(np.full(options.clients, options.beta))
            cuts = (shares.cumsum()[:-1] * len(members)).round().astype(np.int64)
            counts = np.diff(cuts, prepend=0, append=len(members))
            dealt.append((rng.permutation(members), np.repeat(np.arange(options.clients), counts)))
        images, owners = map(np.concatenate, zip(*dealt, strict=True))
        if np.bincount(owners, minlength=options.clients).min() >= options.min_samples:
            break
    else:
        owners = _level(images, owners, options, rng)
    owner = np.empty(len(labels), dtype=np.int64)
    owner[images] = owners
    return Dealt(owner, options.clients)


def _level(
    images: NDArray[Any], owners: NDArray[Any], options: PartitionOptions, rng: np.random.Generator
) -> NDArray[Any]:
    """Who has which image after images have moved from the richest clients to those below the minimum."""
    order = np.argsort(owners, kind="stable")
    cuts = np.bincount(owners, minlength=options.clients).cumsum()[:-1]
    parts = [part.tolist() for part in np.split(order, cuts)]  # places in ``images``
    richest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(richest)
    for poor in parts:
        while len(poor) < options.min_samples:
            # The total suffices, so whoever has most has more than the minimum and is not this client.
            size, client = heapq.heappop(richest)
            if -size != len(parts[client]):
                heapq.heappush(richest, (-len(parts[client]), client))
                continue
            rich = parts[client]
            poor.append(rich.pop(int(rng.integers(len(rich)))))
            heapq.heappush(richest, (-len(rich), client))
    levelled = np.empty_like(owners)
    for client, part in enumerate(parts):
        levelled[part] = client
    return levelled


def by_writer(dataset: Dataset, options: PartitionOptions) -> Dealt:
    """Writer ``w`` belongs to client ``w mod K``, so that no hand is spread over two clients.

    Raises:
        ValueError: the data set does not say who wrote what, or has fewer writers than there are clients.
    """
    if dataset.writers is None:
        raise ValueError("split: only the digits data set knows its writers, choose dirichlet")
    num_writers = int(dataset.writers.max()) + 1
    if options.clients > num_writers:
        raise ValueError(f"split: {num_writers} writers are too few for {options.clients} clients")
    return Dealt((dataset.writers % options.clients).numpy(), options.clients)


DEALT: dict[str, Callable[[Dataset, PartitionOptions], Dealt]] = {
    "dirichlet": dirichlet,
    "writer": by_writer,
}
DRAWN: dict[str, Callable[[Dataset, PartitionOptions], Drawn]] = {"dirichlet-mix": dirichlet_mix}
PARTITIONS = (*DEALT, *DRAWN)


def partition(split: str, dataset: Dataset, options: PartitionOptions) -> Partition:
    """Who has which training images: as the data say, or else by a split.

    Raises:
        ValueError: the images do not suffice for the minimum per client, or the split cannot be made.
    """
    if dataset.owners is None and split in DRAWN:  # clients share images, and all have as many as they are to have
        return DRAWN[split](dataset, options)
    available = len(dataset.train_labels)
    if dataset.owners is None and available < options.clients * options.min_samples:
        raise ValueError(
            f"clients: {options.clients} clients with at least {options.min_samples} samples each need "
            f"{options.clients * options.min_samples} training images, there are {available}; lower min_samples, or "
            "choose the split dirichlet-mix, in which clients share images"
        )
    if dataset.owners is not None:
        parts = Dealt(dataset.owners.numpy(), options.clients)
    else:
        parts = DEALT[split](dataset, options)
    sizes = parts.sizes()
    poorest = int(sizes.argmin())
    if sizes[poorest] < options.min_samples:
        raise ValueError(
            f"split: client {poorest} has {sizes[poorest]} training images, expected at least {options.min_samples}: "
            "see min_samples"
        )
    return parts
