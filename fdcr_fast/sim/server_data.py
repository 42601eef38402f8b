"""Clean data of the server's own, which some rules need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast import ModelQuality
from fdcr_fast.server.randomness import round_generator
from fdcr_fast.sim.training import Worker


@dataclass(frozen=True)
class ServerData:
    """Images that no client has, and what can be done with them; nothing depends on earlier calls.

    Attributes:
        worker: Whose model is used.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        training: Options of :meth:`Worker.train`, those of the clients.
        seed: Of the order of the images.
    """

    worker: Worker
    images: Tensor
    labels: Tensor
    training: Mapping[str, Any]
    seed: int

    def refine(self, params: Tensor) -> Tensor:
        """Parameters ``[P]`` after training from ``params`` on."""
        everything = torch.arange(len(self.labels))
        generator = round_generator(self.seed, "server data", params)
        return self.worker.train(params, self.images, self.labels, everything, generator=generator, **self.training)

    def update(self, params: Tensor) -> Tensor:
        """What training changes."""
        return self.refine(params) - params

    def evaluate(self, params: Tensor) -> ModelQuality:
        """Mean entropy and loss of the model with these parameters."""
        log_p = self.worker.logits(params, self.images).double().log_softmax(1)
        return ModelQuality(-(log_p.exp() * log_p).sum(1).mean().item(), F.nll_loss(log_p, self.labels).item())
