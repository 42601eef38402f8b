"""What any client can do in a round: train from the global model, and compute a Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.server.shared_memory import SharedTensor
from fdcr_fast.sim.attacks.training import LocalAttack
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.metrics import Stopwatch
from fdcr_fast.sim.partition import Partition
from fdcr_fast.sim.seeding import torch_generator
from fdcr_fast.sim.training import Worker


@dataclass(frozen=True, eq=False)
class ClientData:
    """The rows of images and labels that a client trains on."""

    images: Tensor
    labels: Tensor
    rows: Tensor


class ClientShares:
    """The data of every client, made when asked for.

    Args:
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        partition: Which of them each client has.
        shared: Whether other processes can be given the data.
    """

    def __init__(self, images: Tensor, labels: Tensor, partition: Partition, shared: bool = False) -> None:
        self._partition = partition
        self.images, self.labels = images, labels
        self._shared: tuple[SharedTensor, SharedTensor] | None = None
        if shared:
            self._share(SharedTensor.of(images), SharedTensor.of(labels))

    def _share(self, images: SharedTensor, labels: SharedTensor) -> None:
        self._shared = images, labels
        self.images, self.labels = images.tensor, labels.tensor

    def __getstate__(self) -> tuple[Partition, tuple[SharedTensor, SharedTensor]]:
        assert self._shared is not None
        return self._partition, self._shared

    def __setstate__(self, state: tuple[Partition, tuple[SharedTensor, SharedTensor]]) -> None:
        self._partition, shared = state
        self._share(*shared)

    def __len__(self) -> int:
        return len(self._partition)

    def __getitem__(self, client: int) -> ClientData:
        return ClientData(self.images, self.labels, self._partition[client])

    def num_samples(self, client: int) -> int:
        """``n_k``."""
        return self._partition.size(client)


@dataclass(frozen=True, eq=False)
class LocalWork:
    """One round's work, by the one worker that stands in for every client.

    Attributes:
        round: Counted from 1.
        params: Global parameters as sent out, ``[P]``.
        last_update: What the last round changed in them, ``[P]``; None in the first round.
    """

    config: SimulationConfig
    worker: Worker
    clock: Stopwatch
    round: int
    params: Tensor
    last_update: Tensor | None

    def train(
        self, client: int, data: ClientData, attack: LocalAttack | None = None, epochs: int | None = None
    ) -> Tensor:
        """The client's model ``w_k [P]`` after local training, of as many epochs as configured or as given."""
        options = self.config.training() if epochs is None else {**self.config.training(), "epochs": epochs}
        with self.clock.phase("training"):
            return self.worker.train(
                self.params,
                data.images,
                data.labels,
                data.rows,
                generator=self.shuffle(client),
                attack=attack,
                **options,
            )

    def shuffle(self, client: int) -> torch.Generator:
        """Of the order in which a client takes its images."""
        return torch_generator(self.config.seed, "shuffle", self.round, client)

    def fisher_rows(self, rows: Tensor) -> Tensor:
        """Those that a Fisher is taken over: all, or ``fisher_samples`` drawn by seed and round."""
        most = self.config.fisher_samples
        if most is None or most >= len(rows):
            return rows
        generator = torch_generator(self.config.seed, "fisher", self.round)
        return rows[torch.randperm(len(rows), generator=generator)[:most]]

    def fisher(self, data: ClientData, params: Tensor) -> Tensor:
        """Diagonal Fisher ``[P]`` of the data at a model."""
        with self.clock.phase("fisher"):
            return self.worker.fisher(params, data.images, data.labels, self.fisher_rows(data.rows))
