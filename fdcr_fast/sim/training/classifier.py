"""A model that stands in for every client's: by operators of small networks, or by autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import ParamLayout, _native, diagonal_fisher
from fdcr_fast.ops import networks
from fdcr_fast.sim.training.network import network_layers
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.sgd import SGD

BATCH = 1024  # images of one forward pass by autograd
FISHER_BATCH = 256  # images of one batch of a Fisher by autograd


class Classifier(ABC):
    """One model that tells classes apart, with whatever parameters ``[P]`` it is given, which are never changed.

    Parameters travel as flat vectors in the order of ``layout``; the model's own are views of one such vector.

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

    def params(self) -> Tensor:
        """The model's own parameters."""
        return self._params.clone()

    def load(self, params: Tensor) -> None:
        """Set the model's own parameters."""
        self._params.copy_(params)

    @abstractmethod
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """The model's output ``[N, classes]`` for images ``[N, C, H, W]``."""

    def predict(self, params: Tensor, images: Tensor) -> Tensor:
        """The most probable class of each image, int64 ``[N]``."""
        return self.logits(params, images).argmax(1)

    @abstractmethod
    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the images with these indices, and its gradient ``[P]``."""

    @abstractmethod
    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` (eq. 5) of the images with these indices."""

    def train(
        self,
        params: Tensor,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        sgd: SGD,
        objective: Objective | None = None,
    ) -> Tensor:
        """Parameters ``[P]`` after training from ``params`` on.

        Args:
            params: Where training begins.
            images: ``[N, C, H, W]``.
            labels: int64 ``[N]``.
            order: Indices of the images in the order in which each epoch takes them, int64 ``[epochs, n]``.
            sgd: How it is done.
            objective: What is minimised; None for the class loss alone.
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


class NetworkClassifier(Classifier):
    """A model by the operators of small networks: no autograd graph, nothing allocated per layer.

    Args:
        model: Its architecture is ``layers``.
        layers: See :class:`fdcr_fast.ops.networks.NetworkLayer`.
    """

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        super().__init__(model)
        self.layers = layers

    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """The output, from one operator."""
        return networks.network_outputs(params, images, torch.arange(len(images)), self.layers)

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient, by one operator."""
        return networks.network_grad(params, images, labels, indices, self.layers)

    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """The diagonal Fisher, by one operator."""
        return networks.sum_squared_network_grads(params, images, labels, indices, self.layers) / len(indices)

    def train(
        self,
        params: Tensor,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        sgd: SGD,
        objective: Objective | None = None,
    ) -> Tensor:
        """All steps in one operator, unless an objective looks at each."""
        if objective is not None:
            return super().train(params, images, labels, order, sgd, objective)
        return networks.train_network(params, images, labels, order, self.layers, *sgd)


class AutogradClassifier(Classifier):
    """Any model, by autograd; channels-last, as convolutions and pooling are faster so on CPU."""

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """The output of the model in evaluation mode."""
        self.load(params)
        self.model.eval()
        return torch.cat([self.model(_channels_last(batch)) for batch in images.split(BATCH)])

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the model in training mode."""
        self.load(params)
        self.model.train()
        loss = F.cross_entropy(self.model(_channels_last(images[indices])), labels[indices])
        grads = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads])

    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """The diagonal Fisher, by :func:`fdcr_fast.diagonal_fisher`."""
        self.load(params)
        batches = ((images[batch], labels[batch]) for batch in indices.split(FISHER_BATCH))
        return diagonal_fisher(self.model, batches)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def classifier_of(model: nn.Module) -> Classifier:
    """The fastest classifier for a model: the operators, if these are compiled and it consists of what they know.

    Raises:
        ValueError: the model has buffers.
    """
    layers = network_layers(model)
    if layers is None or not _native.loaded:
        return AutogradClassifier(model)
    return NetworkClassifier(model, layers)
