"""Which training images are a client's: in arrays over the images, or drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast.sim.seeding import numpy_generator

MOST_KEPT = 1024  # clients whose draw is kept: it takes a tenth of the training of 50 images


@dataclass(frozen=True)
class PartitionOptions:
    """What a partition may depend on."""

    clients: int
    min_samples: int
    beta: float
    seed: int
    samples_per_client: int | None = None


class Partition(Sequence[Tensor]):
    """Sorted indices of each client's training images, int64 ``[n_k]``."""

    @overload
    def __getitem__(self, client: int) -> Tensor: ...
    @overload
    def __getitem__(self, client: slice) -> list[Tensor]: ...
    def __getitem__(self, client: int | slice) -> Tensor | list[Tensor]:
        if isinstance(client, slice):
            return [self[index] for index in range(*client.indices(len(self)))]
        if not 0 <= client < len(self):
            raise IndexError(f"no client {client}, there are {len(self)}")
        return torch.from_numpy(self.indices(client))

    def indices(self, client: int) -> NDArray[np.int64]:
        """The images of one client, sorted."""
        raise NotImplementedError

    def size(self, client: int) -> int:
        """``n_k``, without looking at the images."""
        raise NotImplementedError


class Dealt(Partition):
    """Every image is one client's.

    Args:
        owner: Client that has each image, ``[N]``.
        clients: Number of clients.
    """

    def __init__(self, owner: NDArray[np.int64], clients: int) -> None:
        self._images = np.argsort(owner, kind="stable")
        self._starts = np.concatenate([[0], np.bincount(owner, minlength=clients).cumsum()])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sizes(self) -> NDArray[Any]:
        """How many images each client has."""
        return np.diff(self._starts)

    def indices(self, client: int) -> NDArray[np.int64]:
        """The images that it was dealt; a view."""
        return self._images[self._starts[client] : self._starts[client + 1]]

    def size(self, client: int) -> int:
        """How many images it was dealt."""
        return int(self._starts[client + 1] - self._starts[client])


@dataclass(frozen=True, eq=False)
class Drawn(Partition):
    """Every client draws its images for itself, which other clients may have, too; see
    :func:`fdcr_fast.sim.datasets.splits.dirichlet_mix`.

    Attributes:
        by_class: Images in the order of their classes.
        starts: Where each class that has images begins, and ``N``.
        options: What the draw depends on.
    """

    by_class: NDArray[np.int64]
    starts: NDArray[np.int64]
    options: PartitionOptions

    def __len__(self) -> int:
        return self.options.clients

    @lru_cache(maxsize=MOST_KEPT)  # noqa: B019 (a few megabytes, for as long as other clients do not need them)
    def indices(self, client: int) -> NDArray[np.int64]:
        """The images that it draws: always the same, drawn anew where they were not asked for lately."""
        rng = numpy_generator(self.options.seed, "dirichlet mix", client)
        sizes = np.diff(self.starts)
        mix = rng.dirichlet(np.full(len(sizes), self.options.beta)).cumsum()
        # What rng.choice(p=mix) does, without its checks, which take as long as all the rest.
        label = (mix / mix[-1]).searchsorted(rng.random(self.options.samples_per_client), side="right")
        return np.sort(self.by_class[self.starts[label] + rng.integers(sizes[label])])

    def size(self, client: int) -> int:
        """``n_k``, the same for all."""
        assert self.options.samples_per_client is not None
        return self.options.samples_per_client
