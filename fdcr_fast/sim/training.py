"""Local training and evaluation of one reused model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdcr_fast import ParamLayout
from fdcr_fast.sim.attacks.training import LocalAttack
from fdcr_fast.sim.classifier import SGD, classifier_of


def shuffled(rows: Tensor, epochs: int, generator: torch.Generator) -> Tensor:
    """The given rows once per epoch, each time in another order, ``[epochs, n]``."""
    order = torch.empty(epochs, len(rows), dtype=torch.int64)
    for epoch in order:
        torch.randperm(len(rows), generator=generator, out=epoch)
    return rows[order]


class Worker:
    """One model instance that stands in for every client in turn, with the parameters ``[P]`` that it is given.

    Parameters travel as flat vectors in the order of ``layout``; the model's are views of one such vector.

    Args:
        model: Its parameters may be overwritten by every call.

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
        """The model's own parameters."""
        return self._params.clone()

    def load(self, params: Tensor) -> None:
        """Set the model's own parameters."""
        self._params.copy_(params)

    def train(
        self,
        params: Tensor,
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
    ) -> Tensor:
        """Parameters after training from ``params`` by SGD on the given rows, reshuffled in every epoch.

        Args:
            attack: How an attacker deviates from that.
        """
        sgd = SGD(batch_size, lr, momentum, weight_decay)
        return self._classifier.train(params, images, labels, shuffled(rows, epochs, generator), sgd, attack)

    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` (eq. 5) over the given rows."""
        return self._classifier.fisher(params, images, labels, rows)

    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """The model's output ``[N, classes]`` for images ``[N, C, H, W]``."""
        return self._classifier.logits(params, images)

    def predict(self, params: Tensor, images: Tensor) -> Tensor:
        """The most probable class of each image, int64 ``[N]``."""
        return self.logits(params, images).argmax(1)
