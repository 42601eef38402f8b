"""Clean data of the server, which some rules need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast import ModelQuality
from fdcr_fast.rules.randomness import round_generator
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.sgd import SGD, shuffled


@dataclass(frozen=True)
class ServerData:
    """Images that no client has, and what can be done with them; nothing depends on earlier calls.

    Attributes:
        classifier: The model.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        sgd: How the server trains: as the clients do.
        epochs: Number of epochs that it trains.
        seed: Seed of the order of the images.
    """

    classifier: Classifier
    images: Tensor
    labels: Tensor
    sgd: SGD
    epochs: int
    seed: int

    def refine(self, params: Tensor) -> Tensor:
        """Parameters ``[P]`` after training from ``params`` on."""
        generator = round_generator(self.seed, "server data", params)
        order = shuffled(torch.arange(len(self.labels)), self.epochs, generator)
        return self.classifier.train(params, self.images, self.labels, order, self.sgd)

    def update(self, params: Tensor) -> Tensor:
        """What training from ``params`` on changes in them, ``[P]``."""
        return self.refine(params) - params

    def evaluate(self, params: Tensor) -> ModelQuality:
        """Mean entropy and loss of the model with these parameters."""
        log_p = self.classifier.logits(params, self.images).double().log_softmax(1)
        return ModelQuality(-(log_p.exp() * log_p).sum(1).mean().item(), F.nll_loss(log_p, self.labels).item())
