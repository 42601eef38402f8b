"""What the operators of small networks mean, in plain PyTorch; see ``network_schemas``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fdcr_fast.ops.network_schemas import NetworkLayer, sized_layers


class _Step(NamedTuple):
    """A layer's parameters, and what its forward pass leaves behind."""

    layer: NetworkLayer
    weight: Tensor
    bias: Tensor | None
    input: Tensor
    shape: torch.Size  # before pooling
    winners: Tensor | None
    output: Tensor


def network_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> Tensor:
    """The logits; see ``network_schemas``."""
    return _forward(params, images[rows], layers)[-1].output.flatten(1)


def network_grad(
    params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and its gradient; see ``network_schemas``."""
    steps = _forward(params, images[rows], layers)
    log_p = steps[-1].output.flatten(1).log_softmax(1)
    loss = F.nll_loss(log_p, labels[rows])

    def gradients(step: _Step, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight = conv2d_weight(step.input, step.weight.shape, grad, padding=step.layer[3:5])
        return weight, grad.sum((0, 2, 3))

    return loss, _backward(steps, (log_p.exp() - _one_hot(labels[rows], log_p)) / max(len(rows), 1), gradients)


def sum_squared_network_grads(
    params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]
) -> Tensor:
    """Squared gradients of single images, summed; see ``network_schemas``."""
    total = torch.zeros_like(params)
    for batch in rows.split(64) if len(rows) else ():  # bounds the memory
        steps = _forward(params, images[batch], layers)
        p = steps[-1].output.flatten(1).softmax(1)

        def gradients(step: _Step, grad: Tensor) -> tuple[Tensor, Tensor]:
            n = len(grad)
            x = step.input.reshape(1, -1, *step.input.shape[2:])
            shape = (n * step.weight.shape[0], *step.weight.shape[1:])
            each = conv2d_weight(x, shape, grad.reshape(1, -1, *grad.shape[2:]), padding=step.layer[3:5], groups=n)
            return each.view(n, *step.weight.shape).square().sum(0), grad.sum((2, 3)).square().sum(0)

        total += _backward(steps, p - _one_hot(labels[batch], p), gradients)
    return total


def sgd_step(params: Tensor, velocity: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
    """One step of SGD; see ``network_schemas``."""
    velocity.mul_(momentum).add_(grad).add_(params, alpha=weight_decay)
    params.sub_(velocity, alpha=lr)


def train_network(
    params: Tensor,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    layers: Sequence[int],
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """Epochs of steps; see ``network_schemas``."""
    params, velocity = params.clone(), torch.zeros_like(params)
    for epoch in order:
        for first in range(0, len(epoch), batch_size):
            _, grad = network_grad(params, images, labels, epoch[first : first + batch_size], layers)
            sgd_step(params, velocity, grad, lr, momentum, weight_decay)
    return params


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, labels[:, None], 1)


def _forward(params: Tensor, x: Tensor, layers: Sequence[int]) -> list[_Step]:
    steps = []
    at = 0
    for layer, shape, _ in sized_layers(layers, x.shape[1:]):
        count = torch.Size(shape).numel()
        weight = params[at : at + count].view(shape)
        bias = params[at + count : at + count + layer.out_channels] if layer.bias else None
        at += count + layer.bias * layer.out_channels
        y = F.conv2d(x, weight, bias, padding=layer[3:5])
        before, winners = y.shape, None
        if layer.pool:
            y, winners = F.max_pool2d(y, 2, return_indices=True)
        if layer.relu:
            y = y.relu()
        steps.append(_Step(layer, weight, bias, x, before, winners, y))
        x = y
    return steps


def _backward(steps: list[_Step], grad: Tensor, gradients: Callable[[_Step, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    grad = grad[:, :, None, None]
    found: list[Tensor] = []
    for step in reversed(steps):
        if step.layer.relu:
            grad = torch.where(step.output <= 0, 0, grad)
        if step.winners is not None:
            pixels = grad.new_zeros(step.shape).flatten(2)
            grad = pixels.scatter_(2, step.winners.flatten(2), grad.flatten(2)).view(step.shape)
        weight, bias = gradients(step, grad)
        found += [weight.flatten()] if step.bias is None else [bias, weight.flatten()]
        if step is not steps[0]:
            grad = conv2d_input(step.input.shape, step.weight, grad, padding=step.layer[3:5])
    return torch.cat(found[::-1])
