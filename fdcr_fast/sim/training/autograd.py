"""Any model, by autograd: nothing between the images and the model, and one vector for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.ops import networks
from fdcr_fast.sim.datasets.dataset import stored
from fdcr_fast.sim.seeding import with_torch_seed
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.convolutions import fast_convolutions
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.precision import FULL, Precision, autocast
from fdcr_fast.sim.training.sgd import SGD

BATCH = 256  # images of one forward pass without gradients
FISHER_BATCH = 256  # images of one batch of a Fisher

# (output [N, classes], labels [N]) to losses of the samples [N], and (parameters, learning rate) to an optimizer.
Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


class AutogradClassifier(Classifier):
    """Any model, by autograd; images and filters channels last, as convolutions and pooling are faster so on CPU.

    So the parameters of a convolution lie in its part of the model's own vector as ``[O, H, W, I]``. A model that takes
    contiguous images alone, such as one that flattens by ``x.view(len(x), -1)``, gets these: the first ones tell.
    Whatever comes and goes is in the order of ``layout``.

    Args:
        model: See :class:`Classifier`.
        loss: Losses of the samples; None for cross-entropy.
        optimizer: What makes the optimizer of a client; None for SGD as configured.
        precision: What gradients are computed in; outputs and Fishers are always of float32.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        precision: Precision = FULL,
    ) -> None:
        super().__init__(model)
        self._loss = loss
        self._optimizer = optimizer
        self._precision = precision
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._velocity = torch.empty_like(self._params)  # of one client after the other
        self._filters: set[str] = set()  # those that lie channels last
        self._tried = False

    def _settle(self, images: Tensor) -> None:
        """Choose the layout by the first images."""
        if self._tried:
            return
        self._tried = True
        filters = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Conv2d)}
        self._lay({name for name, value in self._trained.items() if id(value) in filters})
        if not self._takes(images[:1]):
            self._lay(set())

    @torch.no_grad()
    def _takes(self, images: Tensor) -> bool:
        """Whether the model has nothing against images in this layout; in evaluation mode, which changes no buffers."""
        self.model.eval()
        try:
            with_torch_seed(0, lambda: self._output(images))
        except Exception:  # which comes again where it can be told what failed, if it is not about the layout
            return False
        return True

    def _lay(self, filters: set[str]) -> None:
        """Let these filters lie channels last, and no other parameters."""
        given = self.params()
        for name in self._filters | filters:
            slot, (out, into, *size) = self._params[self.layout.slices[name]], self._trained[name].shape
            last = slot.view(out, *size, into).permute(0, 3, 1, 2) if name in filters else slot.view(out, into, *size)
            self._trained[name].data = last
        self._filters = filters
        self.load(given)

    def params(self) -> Tensor:
        """The model's own parameters."""
        params = torch.empty_like(self._params)
        for name, values in self.layout.unflatten(params).items():
            values.copy_(self._trained[name].detach())  # in a third of the time of cat, where filters lie channels last
        return params

    def load(self, params: Tensor) -> None:
        """Set the model's own parameters."""
        for name, values in self.layout.unflatten(params).items():
            self._trained[name].data.copy_(values)

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor, buffers: Tensor | None = None) -> Tensor:
        """The output of the model in evaluation mode."""
        self._settle(images)
        self.load(params)
        self.load_buffers(buffers)
        self.model.eval()
        with fast_convolutions():
            return torch.cat([self._output(batch) for batch in images.split(BATCH)])

    def _output(self, images: Tensor) -> Tensor:
        """What the model says of images: its output, or the ``logits`` of one that returns more than that."""
        output = self.model(stored(images) if self._filters else images.contiguous())
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the model in training mode."""
        self._settle(images)
        self.load(params)
        self.model.train()
        loss, grads = self._grads(images[indices], labels[indices])
        return loss, _flat(grads)

    def _grads(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients, one for each parameter, at the model's own parameters."""
        with fast_convolutions():
            with autocast(self._precision, images.device):
                output = self._output(images)
            if self._precision != FULL:
                output = output.float()  # a loss of bfloat16 would round the sum over classes
            loss = F.cross_entropy(output, labels) if self._loss is None else self._loss(output, labels).mean()
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained.values()]
        self.model.zero_grad(set_to_none=True)
        return loss.detach(), grads

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
        """All steps on the model's own parameters."""

        def steps() -> None:
            step = self._stepper(sgd)
            for epoch in order:
                for batch in epoch.split(sgd.batch_size):
                    loss, grads = self._grads(images[batch], labels[batch])
                    if objective is None:
                        step(grads)
                        continue
                    grad = objective.grad(loss, _flat(grads), self.params())
                    step(list(self.layout.unflatten(grad).values()))
                    self.load(objective.project(self.params()))

        self._settle(images)
        self.load(params)
        self.load_buffers(buffers)
        self.model.train()
        with_torch_seed(seed, steps)
        if buffers is not None:
            buffers.copy_(self.buffers())
        return self.params()

    def _stepper(self, sgd: SGD) -> Callable[[Sequence[Tensor]], None]:
        """A function that steps along gradients, with what a new optimizer remembers."""
        if self._optimizer is not None:
            return self._step_of(self._optimizer(list(self._trained.values()), sgd.lr))
        self._velocity.zero_()
        slots = [(self._params[part], self._velocity[part]) for part in self.layout.slices.values()]

        def step(grads: Sequence[Tensor]) -> None:
            for (name, grad), (values, own_velocity) in zip(self._named(grads), slots, strict=True):
                along = grad.permute(0, 2, 3, 1) if name in self._filters else grad
                networks.sgd_step(values, own_velocity, along.reshape(-1), sgd.lr, sgd.momentum, sgd.weight_decay)

        return step

    def _step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[Sequence[Tensor]], None]:
        def step(grads: Sequence[Tensor]) -> None:
            for name, grad in self._named(grads):
                self._trained[name].grad = grad
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _named(self, grads: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        return zip(self._trained, grads, strict=True)


def _flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in grads])
