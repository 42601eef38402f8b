"""Local training and evaluation of one reused model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdcr_fast import ParamLayout, ops
from fdcr_fast.sim.attacks.training import LocalAttack
from fdcr_fast.sim.classifier import classifier_of


class Worker:
    """One model instance that stands in for every client in turn.

    Parameters travel as flat vectors ``[P]`` in the order of ``layout``; the model's are views of one such vector.

    Args:
        model: Its parameters are overwritten by every call.

    Raises:
        ValueError: the model has buffers, which a flat vector of parameters does not carry.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [name for name, _ in model.named_buffers()]
        if buffers:
            raise ValueError(f"the simulator's models must not have buffers, got {', '.join(buffers)}")
        self.model = model
        self.layout = ParamLayout.from_module(model)
        self._params = self.layout.flatten(model)
        views = self.layout.unflatten(self._params)
        for name, parameter in model.named_parameters():
            parameter.data = views[name]
        self._classifier = classifier_of(model, self._params)

    def params(self) -> Tensor:
        """The model's parameters ``[P]``."""
        return self._params.clone()

    def load(self, params: Tensor) -> None:
        """Set the model's parameters."""
        self._params.copy_(params)

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        generator: torch.Generator,
        attack: LocalAttack | None = None,
    ) -> None:
        """Train from the loaded parameters by SGD on the given rows, reshuffled in every epoch.

        Args:
            attack: How an attacker deviates from that.
        """
        velocity = torch.zeros_like(self._params)
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for batch in order.split(batch_size):
                loss, grad = self._classifier.grad(images, labels, batch)
                if attack is not None:
                    grad = attack.grad(loss, grad, self._params)
                ops.sgd_step(self._params, velocity, grad, lr, momentum, weight_decay)
                if attack is not None:
                    self.load(attack.project(self._params))

    def fisher(self, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` at the current parameters (eq. 5) over the given rows."""
        return self._classifier.fisher(images, labels, rows)

    def logits(self, images: Tensor) -> Tensor:
        """The model's output ``[N, classes]`` for images ``[N, C, H, W]``."""
        return self._classifier.logits(images)

    def predict(self, images: Tensor) -> Tensor:
        """The most probable class of each image, int64 ``[N]``."""
        return self.logits(images).argmax(1)
