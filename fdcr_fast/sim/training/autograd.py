"""Any model, by autograd: nothing between the images and the model, and one vector for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.ops import networks
from fdcr_fast.sim.datasets.dataset import stored
from fdcr_fast.sim.seeding import with_torch_seed
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.sgd import SGD

BATCH = 256  # images of one forward pass without gradients
FISHER_BATCH = 256  # images of one batch of a Fisher

# (output [N, classes], labels [N]) to losses of the samples [N], and (parameters, learning rate) to an optimizer.
Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


class AutogradClassifier(Classifier):
    """Any model, by autograd; images channels last, as convolutions and pooling are faster so on CPU.

    Args:
        model: See :class:`Classifier`.
        loss: Losses of the samples; None for cross-entropy.
        optimizer: What makes the optimizer of a client; None for SGD as configured.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__(model)
        self._loss = loss
        self._optimizer = optimizer
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor, buffers: Tensor | None = None) -> Tensor:
        """The output of the model in evaluation mode."""
        self.load(params)
        self.load_buffers(buffers)
        self.model.eval()
        return torch.cat([output_of(self.model, batch) for batch in images.split(BATCH)])

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the model in training mode."""
        self.load(params)
        self.model.train()
        return self._grad(images[indices], labels[indices])

    def _grad(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = output_of(self.model, images)
        loss = F.cross_entropy(output, labels) if self._loss is None else self._loss(output, labels).mean()
        grads = torch.autograd.grad(loss, self._trained, allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([grad.reshape(-1) for grad in grads])

    def fisher(
        self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor, buffers: Tensor | None = None
    ) -> Tensor:
        """The diagonal Fisher, by :func:`fdcr_fast.diagonal_fisher`."""
        self.load(params)
        self.load_buffers(buffers)
        batches = ((images[batch], labels[batch]) for batch in indices.split(FISHER_BATCH))
        loss = "cross_entropy" if self._loss is None else self._loss
        return diagonal_fisher(self.model, batches, loss, params=self.layout.names)

    def train(
        self,
        params: Tensor,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        sgd: SGD,
        objective: Objective | None = None,
        buffers: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """All steps on the model's own vector of parameters."""

        def steps() -> None:
            step = self._stepper(sgd)
            for epoch in order:
                for batch in epoch.split(sgd.batch_size):
                    loss, grad = self._grad(images[batch], labels[batch])
                    if objective is not None:
                        grad = objective.grad(loss, grad, self._params)
                    step(grad)
                    if objective is not None:
                        self._params.copy_(objective.project(self._params))

        self.load(params)
        self.load_buffers(buffers)
        self.model.train()
        with_torch_seed(seed, steps)
        if buffers is not None:
            buffers.copy_(self.buffers())
        return self.params()

    def _stepper(self, sgd: SGD) -> Callable[[Tensor], None]:
        """A function that steps along a gradient ``[P]``, with what a new optimizer remembers."""
        if self._optimizer is None:
            velocity = torch.zeros_like(self._params)
            return lambda grad: networks.sgd_step(self._params, velocity, grad, sgd.lr, sgd.momentum, sgd.weight_decay)
        optimizer = self._optimizer(self._trained, sgd.lr)

        def step(grad: Tensor) -> None:
            for parameter, part in zip(self._trained, self.layout.unflatten(grad).values(), strict=True):
                parameter.grad = part
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of images: its output, or the ``logits`` of one that returns more than that."""
    output = model(stored(images))
    logits: Tensor = getattr(output, "logits", output)
    return logits
