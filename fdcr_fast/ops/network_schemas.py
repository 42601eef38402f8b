"""Operators of small networks for classification: outputs, gradients, and a step of SGD on flat parameters.

A network is a sequence of layers, each a convolution of stride 1 with zero padding, then optionally 2 by 2 max-pooling
and ReLU. A linear layer is the convolution whose kernel is as large as its input. The last layer gives one pixel with a
channel per class. ``M`` images, ``B`` of them in a batch, ``P`` parameters: of every layer its weight
``[out, in, kernel, kernel]``, then its bias, flattened one after the other. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class NetworkLayer(NamedTuple):
    """The numbers that describe a layer; ``layers`` of the operators are those of all layers in a row.

    Attributes:
        out_channels: Of the convolution.
        kernel_height: 0: as large as the input, in both directions.
        kernel_width: See ``kernel_height``.
        padding_height: Zeros on both sides.
        padding_width: See ``padding_height``.
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


def network_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> Tensor:
    """What a network gives for some of the images: the logits of the classes.

    Args:
        params: ``[P]``.
        images: ``[M, C, H, W]``, any strides.
        rows: int64 ``[B]``, the images to take, from 0 to ``M - 1``.
        layers: See :class:`NetworkLayer`.

    Returns:
        ``[B, classes]``.
    """
    return cast(Tensor, torch.ops.fdcr_fast.network_outputs(params, images, rows, layers))


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
    return cast("tuple[Tensor, Tensor]", torch.ops.fdcr_fast.network_grad(params, images, labels, rows, layers))


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
    return cast(Tensor, torch.ops.fdcr_fast.sum_squared_network_grads(params, images, labels, rows, layers))


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
    torch.ops.fdcr_fast.sgd_step(params, velocity, grad, lr, momentum, weight_decay)


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
        batch_size: Of a step; the last one of an epoch takes what is left.
        lr: As in :func:`sgd_step`, and so are ``momentum`` and ``weight_decay``.

    Returns:
        ``[P]``.
    """
    return cast(
        Tensor,
        torch.ops.fdcr_fast.train_network(
            params, images, labels, order, layers, batch_size, lr, momentum, weight_decay
        ),
    )


# --- what each operator accepts ---------------------------------------------------------------------------------------


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


def _check_grad(params: Tensor, images: Tensor, labels: Tensor, rows: Tensor, layers: Sequence[int]) -> None:
    _check_outputs(params, images, rows, layers)
    _check_vector("labels", labels, torch.int64)
    torch._check(
        labels.shape[0] == images.shape[0], lambda: f"got {labels.shape[0]} labels for {images.shape[0]} images"
    )


def _check_sgd_step(params: Tensor, velocity: Tensor, grad: Tensor, *_: float) -> None:
    for name, x in (("params", params), ("velocity", velocity), ("grad", grad)):
        _check_vector(name, x, torch.float32)
    torch._check(
        params.shape == velocity.shape == grad.shape, lambda: "params, velocity and grad must have the same length"
    )
    torch._check(params.is_contiguous() and velocity.is_contiguous(), lambda: "params and velocity must be contiguous")


def _check_training(
    params: Tensor,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    layers: Sequence[int],
    batch_size: int,
    *_: float,
) -> None:
    torch._check(order.dim() == 2, lambda: f"order must be [epochs, images], got {list(order.shape)}")
    torch._check(batch_size > 0, lambda: f"batch_size must be positive, got {batch_size}")
    _check_grad(params, images, labels, order.flatten(), layers)


# --- fake kernels -----------------------------------------------------------------------------------------------------


def _fake_outputs(params: Tensor, images: Tensor, rows: Tensor, layers: Sequence[int]) -> Tensor:
    *_, last = sized_layers(layers, images.shape[1:])
    return params.new_empty(rows.shape[0], last.layer.out_channels)


def _fake_grad(params: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return params.new_empty(()), _fake_like_params(params)


def _fake_like_params(params: Tensor, *_: Any) -> Tensor:
    return params.new_empty(params.shape[0])


def _fake_sgd_step(*_: Any) -> None:
    return None


_NETWORK = "Tensor params, Tensor images"

NETWORK_OPERATORS: dict[str, tuple[str, Callable[..., None], Callable[..., Any]]] = {
    "network_outputs": (f"({_NETWORK}, Tensor rows, int[] layers) -> Tensor", _check_outputs, _fake_outputs),
    "network_grad": (
        f"({_NETWORK}, Tensor labels, Tensor rows, int[] layers) -> (Tensor, Tensor)",
        _check_grad,
        _fake_grad,
    ),
    "sum_squared_network_grads": (
        f"({_NETWORK}, Tensor labels, Tensor rows, int[] layers) -> Tensor",
        _check_grad,
        _fake_like_params,
    ),
    "train_network": (
        f"({_NETWORK}, Tensor labels, Tensor order, int[] layers, int batch_size, float lr, float momentum, "
        "float weight_decay) -> Tensor",
        _check_training,
        _fake_like_params,
    ),
    "sgd_step": (
        "(Tensor(a!) params, Tensor(b!) velocity, Tensor grad, float lr, float momentum, float weight_decay) -> ()",
        _check_sgd_step,
        _fake_sgd_step,
    ),
}
