"""What any client can do in a round: train from the global model, and compute a Fisher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdcr_fast.sim.attacks.training import LocalAttack
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.metrics import Stopwatch
from fdcr_fast.sim.seeding import torch_generator
from fdcr_fast.sim.training import Worker


@dataclass(frozen=True, eq=False)
class ClientData:
    """The rows of images and labels that a client trains on."""

    images: Tensor
    labels: Tensor
    rows: Tensor


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
            self.worker.load(self.params)
            self.worker.train(
                data.images,
                data.labels,
                data.rows,
                generator=torch_generator(self.config.seed, "shuffle", self.round, client),
                attack=attack,
                **options,
            )
            return self.worker.params()

    def fisher(self, data: ClientData, params: Tensor) -> Tensor:
        """Diagonal Fisher ``[P]`` of the data at a model."""
        with self.clock.phase("fisher"):
            self.worker.load(params)
            return self.worker.fisher(data.images, data.labels, data.rows)
