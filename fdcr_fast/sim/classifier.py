"""How a model is evaluated, differentiated and trained: by operators of small networks, or by autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import _native, diagonal_fisher
from fdcr_fast.ops import networks
from fdcr_fast.ops.networks import NetworkLayer
from fdcr_fast.sim.attacks.training import LocalAttack

BATCH = 1024  # images of one forward pass by autograd


class SGD(NamedTuple):
    """How a client trains: mini-batch stochastic gradient descent with momentum and weight decay."""

    batch_size: int
    lr: float
    momentum: float
    weight_decay: float


class Classifier(ABC):
    """A model that tells classes apart, with any parameters ``[P]``, which are given flat and never changed."""

    @abstractmethod
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """``[N, classes]`` of images ``[N, C, H, W]``."""

    @abstractmethod
    def grad(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the given rows, and its gradient ``[P]``."""

    @abstractmethod
    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` (eq. 5) of the given rows."""

    def train(
        self, params: Tensor, images: Tensor, labels: Tensor, order: Tensor, sgd: SGD, attack: LocalAttack | None
    ) -> Tensor:
        """Parameters ``[P]`` after epochs over the rows ``order [E, n]``, each in its order."""
        params, velocity = params.clone(), torch.zeros_like(params)
        for epoch in order:
            for first in range(0, len(epoch), sgd.batch_size):
                loss, grad = self.grad(params, images, labels, epoch[first : first + sgd.batch_size])
                if attack is not None:
                    grad = attack.grad(loss, grad, params)
                networks.sgd_step(params, velocity, grad, sgd.lr, sgd.momentum, sgd.weight_decay)
                if attack is not None:
                    params.copy_(attack.project(params))
        return params


class NetworkClassifier(Classifier):
    """By the operators of small networks: no autograd graph, nothing allocated per layer.

    Args:
        layers: See :class:`fdcr_fast.ops.networks.NetworkLayer`.
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers

    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """``[N, classes]``."""
        return networks.network_outputs(params, images, torch.arange(len(images)), self.layers)

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient."""
        return networks.network_grad(params, images, labels, rows, self.layers)

    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal Fisher."""
        return networks.sum_squared_network_grads(params, images, labels, rows, self.layers) / len(rows)

    def train(
        self, params: Tensor, images: Tensor, labels: Tensor, order: Tensor, sgd: SGD, attack: LocalAttack | None
    ) -> Tensor:
        """All steps in one operator, unless an attack looks at each."""
        if attack is not None:
            return super().train(params, images, labels, order, sgd, attack)
        return networks.train_network(params, images, labels, order, self.layers, *sgd)


class AutogradClassifier(Classifier):
    """By autograd, for any model; channels-last, as convolutions and pooling are faster so on CPU.

    Args:
        model: Its parameters are overwritten by every call.
        params: Its parameters, flat; what is written here is written there.
    """

    def __init__(self, model: nn.Module, params: Tensor) -> None:
        self._model = model
        self._params = params

    @torch.no_grad()
    def logits(self, params: Tensor, images: Tensor) -> Tensor:
        """``[N, classes]``."""
        self._params.copy_(params)
        self._model.eval()
        return torch.cat([self._model(_channels_last(batch)) for batch in images.split(BATCH)])

    def grad(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient."""
        self._params.copy_(params)
        self._model.train()
        loss = F.cross_entropy(self._model(_channels_last(images[rows])), labels[rows])
        grads = torch.autograd.grad(loss, list(self._model.parameters()), allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads])

    def fisher(self, params: Tensor, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal Fisher."""
        self._params.copy_(params)
        return diagonal_fisher(self._model, ((images[batch], labels[batch]) for batch in rows.split(256)))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def classifier_of(model: nn.Module, params: Tensor) -> Classifier:
    """The fastest classifier for a model whose parameters are views of ``params [P]``.

    It is by the operators if these are compiled and the model consists of what they know.
    """
    layers = network_layers(model)
    if layers is None or _native.module is None:
        return AutogradClassifier(model, params)
    return NetworkClassifier(layers)


def network_layers(model: nn.Module) -> list[int] | None:
    """The model as ``layers`` of the operators of small networks, or None where it is something else.

    That is an ``nn.Sequential`` of plain ``Conv2d`` (stride 1, zero padding), ``MaxPool2d(2)`` after a convolution,
    ``ReLU``, ``Flatten`` and ``Linear``, the last of which is last, with float32 parameters that are all trained.
    """
    if type(model) is not nn.Sequential or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    layers: list[NetworkLayer] = []
    parameters: list[nn.Parameter] = []
    flat = False
    for module in model:
        last = layers[-1] if layers else None
        if type(module) is nn.Conv2d and not flat and _is_plain_convolution(module):
            layers.append(NetworkLayer(module.out_channels, *module.kernel_size, *module.padding))
        elif type(module) is nn.Linear and flat:
            layers.append(NetworkLayer(module.out_features))
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) is nn.ReLU and last is not None:
            layers[-1] = last._replace(relu=1)
        elif type(module) is nn.MaxPool2d and last is not None and not (flat or last.pool) and _halves(module):
            layers[-1] = last._replace(pool=1)  # before or after ReLU is the same
        else:
            return None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[-1] = layers[-1]._replace(bias=int(module.bias is not None))
            parameters += module.parameters()
    trained = all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    once = [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    ends = len(model) > 0 and type(model[-1]) is nn.Linear
    if not (trained and once and ends):
        return None
    return [number for layer in layers for number in layer]


def _is_plain_convolution(module: nn.Conv2d) -> bool:
    strided = module.stride != (1, 1) or module.dilation != (1, 1) or module.groups != 1
    return not strided and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _halves(module: nn.MaxPool2d) -> bool:
    sizes = [x if isinstance(x, tuple) else (x, x) for x in (module.kernel_size, module.stride)]
    plain = module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))
    return sizes == [(2, 2)] * 2 and plain and not (module.ceil_mode or module.return_indices)
