"""Operators of small networks for classification: outputs, gradients, and a step of SGD on flat parameters.

A network is a sequence of layers, each a convolution of stride 1 with zero padding, then optionally 2 by 2 max-pooling
and ReLU. A linear layer is the convolution whose kernel is as large as its input. The last layer gives one pixel with a
channel per class. ``M`` images, ``B`` of them in a batch, ``P`` parameters: of every layer its weight
``[out, in, kernel, kernel]``, then its bias, flattened one after the other. Everything is float32.

Only the simulator trains such networks, and imports this module: :mod:`fdcr_fast.ops` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fdcr_fast.ops.operator import operator


class NetworkLayer(NamedTuple):
    """The numbers that describe a layer; ``layers`` of the operators are those of all layers in a row.

    Attributes:
        out_channels: Channels that the convolution gives.
        kernel_height: Rows of the kernel; 0 for as many as the input has.
        kernel_width: Columns of the kernel; 0 for as many as the input has.
        padding_height: Rows of zeros above and below the input.
        padding_width: Columns of zeros left and right of it.
        pool: Whether the maximum of 2 by 2 pixels is taken; what is left over at the ends is dropped.
        relu: Whether ReLU follows.
        bias: Whether there is one.
    """

    out_channels: int
    kernel_height: int = 0
    kernel_width: int = 0
    padding_height: int = 0
    padding_width: int = 0
    pool: int = 0
    relu: int = 0
    bias: int = 1


class SizedLayer(NamedTuple):
    """A layer and the size of what it works on.

    Attributes:
        weight: Its shape.
    """

    layer: NetworkLayer
    weight: tuple[int, int, int, int]
    result: tuple[int, int]


def sized_layers(layers: Sequence[int], image_shape: Sequence[int]) -> Iterator[SizedLayer]:
    """The layers with the sizes that images ``[C, H, W]`` give them.

    Raises:
        RuntimeError: the numbers are no layers.
    """
    width = len(NetworkLayer._fields)
    torch._check(len(layers) > 0 and len(layers) % width == 0, lambda: f"expected layers of {width} numbers each")
    channels, *size = image_shape
    for i in range(0, len(layers), width):
        layer = NetworkLayer(*layers[i : i + width])
        kernel = [k or s for k, s in zip(layer[1:3], size, strict=True)]
        weight = (layer.out_channels, channels, *kernel)
        size = [(s + 2 * p - k + 1) // (1 + layer.pool) for s, p, k in zip(size, layer[3:5], kernel, strict=True)]
        message = f"layer {i // width} does not fit: {layer} gives {size} pixels"
        torch._check(min(*weight, *size) > 0 and min(layer[3:5]) >= 0, partial(str, message))
        channels = layer.out_channels
        yield SizedLayer(layer, cast("tuple[int, int, int, int]", weight), cast("tuple[int, int]", tuple(size)))


def _check_vector(name: str, x: Tensor, dtype: torch.dtype) -> None:
    message = f"{name} must be a vector of {dtype}, got {x.dtype} {list(x.shape)}"
    torch._check(x.dim() == 1 and x.dtype == dtype, partial(str, message))


def _check_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> None:
    _check_vector("params", params, torch.float32)
    _check_vector("rows", rows, torch.int64)
    torch._check(
        images.dim() == 4 and images.dtype == torch.float32,
        lambda: f"images must be float32 [M, C, H, W], got {images.dtype} {list(images.shape)}",
    )
    used, result = 0, (0, 0)
    for layer, weight, result in sized_layers(layers, images.shape[1:]):  # noqa: B007
        used += torch.Size(weight).numel() + layer.bias * layer.out_channels
    torch._check(result == (1, 1), lambda: f"the layers end with {result} pixels instead of one")
    torch._check(used == params.shape[0], lambda: f"the layers have {used} parameters, got {params.shape[0]}")


def _fake_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> Tensor:
    *_, last = sized_layers(layers, images.shape[1:])
    return params.new_empty(rows.shape[0], last.layer.out_channels)


@operator(check=_check_outputs, fake=_fake_outputs)
def network_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> Tensor:
    """What a network gives for some of the images: the logits of the classes.

    Args:
        params: ``[P]``.
        images: ``[M, C, H, W]``, any strides.
        rows: int64 ``[B]``, the images to take, from 0 to ``M - 1``.
        layers: The numbers of all layers in a row, each a :class:`NetworkLayer`.

    Returns:
        ``[B, classes]``.
    """
    return _forward(params, images[rows], layers)[-1].output.flatten(1)


def _check_grad(params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]) -> None:
    _check_outputs(params, images, rows, layers)
    _check_vector("labels", labels, torch.int64)
    torch._check(
        labels.shape[0] == images.shape[0], lambda: f"got {labels.shape[0]} labels for {images.shape[0]} images"
    )


def _fake_grad(params: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return params.new_empty(()), _fake_vector(params)


@operator(check=_check_grad, fake=_fake_grad)
def network_grad(
    params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a network on some of the images, and its gradient.

    ``loss = mean_b -log softmax(output_b)[label_b]``; of no images NaN, with a gradient of zeros. Where values tie in
    pooling, the first has the gradient.

    Args:
        params: As in :func:`network_outputs`, and so are ``images``, ``rows`` and ``layers``.
        labels: int64 ``[M]``, from 0 to the number of classes - 1 where they are read.

    Returns:
        ``(loss [], grad [P])``.
    """
    steps = _forward(params, images[rows], layers)
    log_p = steps[-1].output.flatten(1).log_softmax(1)
    loss = F.nll_loss(log_p, labels[rows])

    def gradients(step: _Step, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight = conv2d_weight(step.input, step.weight.shape, grad, padding=step.layer[3:5])
        return weight, grad.sum((0, 2, 3))

    return loss, _backward(steps, (log_p.exp() - _one_hot(labels[rows], log_p)) / max(len(rows), 1), gradients)


def _fake_vector(params: Tensor, *_: object) -> Tensor:
    return params.new_empty(params.shape[0])


@operator(check=_check_grad, fake=_fake_vector)
def sum_squared_network_grads(
    params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]
) -> Tensor:
    """Squared gradients of the cross-entropies of single images, summed: ``B`` times the diagonal empirical Fisher.

    ``result[p] = sum_b (d/dp -log softmax(output_b)[label_b])^2``.

    Args:
        params: As in :func:`network_grad`, and so are all others.

    Returns:
        ``[P]``.
    """
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


def _check_sgd_step(
    params: Tensor, velocity: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float
) -> None:
    for name, x in (("params", params), ("velocity", velocity), ("grad", grad)):
        _check_vector(name, x, torch.float32)
    torch._check(
        params.shape == velocity.shape == grad.shape, lambda: "params, velocity and grad must have the same length"
    )
    torch._check(params.is_contiguous() and velocity.is_contiguous(), lambda: "params and velocity must be contiguous")


def _fake_sgd_step(*_: object) -> None:
    return None


@operator(
    check=_check_sgd_step,
    fake=_fake_sgd_step,
    schema="(Tensor(a!) params, Tensor(b!) velocity, Tensor grad, float lr, float momentum, float weight_decay) -> ()",
)
def sgd_step(params: Tensor, velocity: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
    """One step of SGD: ``velocity = momentum velocity + grad + weight_decay params``, ``params -= lr velocity``.

    Args:
        params: ``[P]``, contiguous; written, and so is ``velocity``.
        velocity: ``[P]``, contiguous; zeros before the first step.
        grad: ``[P]``.
        lr: Learning rate.
        momentum: 0 for none.
        weight_decay: 0 for none.
    """
    velocity.mul_(momentum).add_(grad).add_(params, alpha=weight_decay)
    params.sub_(velocity, alpha=lr)


def _check_training(
    params: Tensor,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    layers: Sequence[int],
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    torch._check(order.dim() == 2, lambda: f"order must be [epochs, images], got {list(order.shape)}")
    torch._check(batch_size > 0, lambda: f"batch_size must be positive, got {batch_size}")
    _check_grad(params, images, labels, order.flatten(), layers)


@operator(check=_check_training, fake=_fake_vector)
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
    """Parameters after local training: epochs of :func:`sgd_step` with :func:`network_grad` of batches of images.

    Args:
        params: ``[P]``, to begin with.
        images: As in :func:`network_grad`, and so are ``labels`` and ``layers``.
        order: int64 ``[E, n]``, the images of each of ``E`` epochs in their order.
        batch_size: Images of a step; the last one of an epoch takes what is left.
        lr: As in :func:`sgd_step`, and so are ``momentum`` and ``weight_decay``.

    Returns:
        ``[P]``.
    """
    params, velocity = params.clone(), torch.zeros_like(params)
    for epoch in order:
        for first in range(0, len(epoch), batch_size):
            _, grad = network_grad.reference(params, images, labels, epoch[first : first + batch_size], layers)
            sgd_step.reference(params, velocity, grad, lr, momentum, weight_decay)
    return params


class _Step(NamedTuple):
    """A layer's parameters, and what its forward pass leaves behind."""

    layer: NetworkLayer
    weight: Tensor
    bias: Tensor | None
    input: Tensor
    shape: torch.Size  # before pooling
    winners: Tensor | None
    output: Tensor


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
