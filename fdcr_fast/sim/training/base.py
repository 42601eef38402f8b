"""A model that stands in for every client's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fdcr_fast import ParamGroups, ParamLayout
from fdcr_fast.ops import networks
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.sgd import SGD

NO_BUFFERS = torch.empty(0, dtype=torch.float64)


class Classifier(ABC):
    """One model that tells classes apart, with whatever parameters ``[P]`` it is given, which are never changed.

    Parameters travel as flat vectors in the order of ``layout``; the model's own are views of one such vector. So do
    buffers, such as BatchNorm's running statistics, float64 ``[B]``: those that a state dict has, of real numbers. They
    are the model's own where none are given. Where they are, all other buffers become what they were at first: what one
    client leaves behind is not the next one's.

    Args:
        model: Its parameters and buffers may be overwritten by every call.

    Raises:
        ValueError: the model has no parameters to train, or others than float32, or lazy ones.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError("the model has no parameters to train")
        lazy = [name for name, parameter in trained.items() if is_lazy(parameter)]
        if lazy:
            raise ValueError(f"the model's parameters must have their shapes when it is made, {', '.join(lazy)} do not")
        others = [
            f"{name} {parameter.dtype}" for name, parameter in trained.items() if parameter.dtype != torch.float32
        ]
        if others:
            raise ValueError(f"the simulator's models must have parameters of float32, got {', '.join(others)}")
        self.model = model
        self.layout = ParamLayout.from_tensors(trained)
        self._params = self.layout.flatten(trained)
        views = self.layout.unflatten(self._params)
        for name, parameter in trained.items():
            parameter.data = views[name]
        self._slots = [
            _Slot(module, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._buffers = _buffers_of(model)
        self.buffer_layout = ParamLayout.from_tensors(self._buffers)

    def groups(self) -> ParamGroups:
        """Head and features; where some parameters are not trained, as far as the shapes of the others tell."""
        if self.layout == ParamLayout.from_module(self.model):
            return ParamGroups.from_module(self.model)
        return ParamGroups.from_layout(self.layout)

    def params(self) -> Tensor:
        """The model's own parameters."""
        return self._params.clone()

    def load(self, params: Tensor) -> None:
        """Set the model's own parameters."""
        self._params.copy_(params)

    def buffers(self) -> Tensor:
        """The model's own buffers, float64 ``[B]``."""
        if not self._buffers:
            return NO_BUFFERS.clone()
        return self.buffer_layout.flatten(_buffers_of(self.model), torch.float64).detach()

    @property
    def buffer_dtypes(self) -> dict[str, torch.dtype]:
        """The buffers' own dtypes, by name."""
        return {name: buffer.dtype for name, buffer in self._buffers.items()}

    def load_buffers(self, buffers: Tensor | None) -> None:
        """Set the model's own buffers, if any are given."""
        if buffers is None:
            return
        for slot in self._slots:
            slot.reset()
        if self._buffers:
            for name, values in self.buffer_layout.unflatten(buffers).items():
                self._buffers[name].copy_(values)

    def state(self, params: Tensor, buffers: Tensor) -> dict[str, Tensor]:
        """A copy of the model's state dict with these parameters ``[P]`` and buffers ``[B]``."""
        self.load(params)
        self.load_buffers(buffers)
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @abstractmethod
    def logits(self, params: Tensor, images: Tensor, buffers: Tensor | None = None) -> Tensor:
        """The model's output ``[N, classes]`` for images ``[N, C, H, W]``."""

    def predict(self, params: Tensor, images: Tensor, buffers: Tensor | None = None) -> Tensor:
        """The most probable class of each image, int64 ``[N]``."""
        return self.logits(params, images, buffers).argmax(1)

    @abstractmethod
    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the images with these indices, and its gradient ``[P]``."""

    @abstractmethod
    def fisher(
        self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor, buffers: Tensor | None = None
    ) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` (eq. 5) of the images with these indices."""

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
        """Parameters ``[P]`` after training from ``params`` on.

        Args:
            params: Where training begins.
            images: ``[N, C, H, W]``.
            labels: int64 ``[N]``.
            order: Indices of the images in the order in which each epoch takes them, int64 ``[epochs, n]``; an epoch's
                last batch is what is left.
            sgd: How it is done.
            objective: What is minimised; None for the class loss alone.
            buffers: Those that training begins with, replaced by those that it ends with.
            seed: Seed of what the model draws, such as the masks of dropout.
        """
        params, velocity = params.clone(), torch.zeros_like(params)
        for epoch in order:
            for batch in epoch.split(sgd.batch_size):
                loss, grad = self.grad(params, images, labels, batch)
                if objective is not None:
                    grad = objective.grad(loss, grad, params)
                networks.sgd_step(params, velocity, grad, sgd.lr, sgd.momentum, sgd.weight_decay)
                if objective is not None:
                    params.copy_(objective.project(params))
        return params


class _Slot(NamedTuple):
    """A buffer as a module was made with it, which a forward pass may write to or put another one in the place of."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    first: Tensor | None

    def reset(self) -> None:
        """Put it back, with its first values."""
        self.module._buffers[self.name] = self.buffer
        if self.buffer is not None and self.first is not None:
            self.buffer.copy_(self.first)


def _buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of real numbers that are part of the model's state, by name."""
    state = model.state_dict(keep_vars=True)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in state and buffer.dtype != torch.bool and not buffer.is_complex()
    }
