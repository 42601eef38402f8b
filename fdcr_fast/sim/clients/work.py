"""What any client can do in a round: train from the global model, and compute a Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.sim.clients.data import Samples
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.seeding import derive_seed, torch_generator
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.sgd import batches, shuffled


@dataclass(frozen=True, eq=False)
class LocalWork:
    """One round's work, by the one model that stands in for every client's.

    Attributes:
        config: Configuration of the run.
        classifier: The model.
        clock: Counts the time that clients take.
        round: Counted from 1.
        params: Global parameters as sent out, ``[P]``.
        last_update: What the last round changed in them, ``[P]``; None in the first round.
    """

    config: SimulationConfig
    classifier: Classifier
    clock: Stopwatch
    round: int
    params: Tensor
    last_update: Tensor | None

    def train(
        self,
        client: int,
        samples: Samples,
        objective: Objective | None = None,
        epochs: int | None = None,
        buffers: Tensor | None = None,
    ) -> Tensor:
        """The client's model ``w_k [P]`` after local training, of as many epochs, or steps, as configured or as given.

        ``buffers`` ``[B]`` become those of its model.
        """
        with self.clock.phase("training"):
            order = self.order(client, samples.indices, self.config.local_passes if epochs is None else epochs)
            seed = derive_seed(self.config.seed, "training", self.round, client)
            return self.classifier.train(
                self.params, samples.images, samples.labels, order, self.config.sgd, objective, buffers, seed
            )

    def order(self, client: int, indices: Tensor, epochs: int) -> Tensor:
        """The order in which a client takes its images in each epoch, ``[epochs, n]``, drawn by seed and round.

        With ``local_steps`` there is a batch in each row, and as many of them as ``epochs``.
        """
        generator = torch_generator(self.config.seed, "shuffle", self.round, client)
        if self.config.local_steps is None:
            return shuffled(indices, epochs, generator)
        return batches(indices, epochs, self.config.batch_size, generator)

    def fisher_indices(self, indices: Tensor) -> Tensor:
        """The images that a Fisher is taken over: all, or ``fisher_samples`` of them drawn by seed and round."""
        most = self.config.fisher_samples
        if most is None or most >= len(indices):
            return indices
        generator = torch_generator(self.config.seed, "fisher", self.round)
        return indices[torch.randperm(len(indices), generator=generator)[:most]]

    def fisher(self, samples: Samples, params: Tensor, buffers: Tensor | None = None) -> Tensor:
        """Diagonal Fisher ``[P]`` of the samples at a model."""
        with self.clock.phase("fisher"):
            indices = self.fisher_indices(samples.indices)
            return self.classifier.fisher(params, samples.images, samples.labels, indices, buffers)
