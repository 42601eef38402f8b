"""A model by operators of small networks, and which classifier a model gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdcr_fast import _native
from fdcr_fast.ops import networks
from fdcr_fast.sim.training.autograd import AutogradClassifier, Loss, OptimizerFactory
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.network import network_layers
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.precision import FULL, Precision
from fdcr_fast.sim.training.sgd import SGD


class NetworkClassifier(Classifier):
    """A model by the operators of small networks: no autograd graph, nothing allocated per layer, nothing drawn.

    Such models have no buffers.

    Args:
        model: Its architecture is ``layers``.
        layers: See :class:`fdcr_fast.ops.networks.NetworkLayer`.
    """

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        super().__init__(model)
        self.layers = layers

    def logits(self, params: Tensor, images: Tensor, buffers: Tensor | None = None) -> Tensor:
        """The output, from one operator."""
        return networks.network_outputs(params, images, torch.arange(len(images)), self.layers)

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient, by one operator."""
        return networks.network_grad(params, images, labels, indices, self.layers)

    def fisher(
        self, params: Tensor, images: Tensor, labels: Tensor, indices: Tensor, buffers: Tensor | None = None
    ) -> Tensor:
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
        buffers: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """All steps in one operator, unless an objective looks at each."""
        if objective is not None:
            return super().train(params, images, labels, order, sgd, objective)
        return networks.train_network(params, images, labels, order, self.layers, *sgd)


def classifier_of(
    model: nn.Module,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    precision: Precision = FULL,
) -> Classifier:
    """The fastest classifier for a model: the operators, if these are compiled and it consists of what they know.

    Args:
        model: The model.
        loss: Losses of the samples; None for cross-entropy, which the operators know.
        optimizer: What makes the optimizer of a client; None for SGD as configured, which they know.
        precision: What training computes in; the operators know float32 alone, so others are left to autograd.

    Raises:
        ValueError: the model has no parameters to train, or others than float32.
    """
    known = loss is None and optimizer is None and precision == FULL and _native.loaded
    layers = network_layers(model) if known else None
    if layers is None:
        return AutogradClassifier(model, loss, optimizer, precision)
    return NetworkClassifier(model, layers)


@dataclass(frozen=True)
class Architecture:
    """Makes the model that stands in for every client's: here, and in worker processes.

    Attributes:
        build: Makes the module with its initial weights.
        loss: See :func:`classifier_of`.
        optimizer: See :func:`classifier_of`.
        precision: See :func:`classifier_of`.
    """

    build: Callable[[], nn.Module]
    loss: Loss | None = None
    optimizer: OptimizerFactory | None = None
    precision: Precision = FULL

    def __call__(self) -> nn.Module:
        """The module by itself."""
        return self.build()

    def classifier(self) -> Classifier:
        """The module with what trains it.

        Raises:
            ValueError: see :func:`classifier_of`.
        """
        return classifier_of(self.build(), self.loss, self.optimizer, self.precision)
