"""Operators of convolutions of 3 by 3 taps with stride 1 and one pixel of zero padding, and of their gradients.

Images are ``[N, H, W, channels]`` and weights ``[O, 3, 3, I]``, float32; all channels are multiples of 16. The kernels
use Winograd's minimal filtering of 2 by 2 outputs, which takes 16 products where the definition has 36. Sums differ
from the definition's in the order of their terms and in rounding, not in accuracy; but where it gives infinities, or
products beyond the largest number, there may be NaN.

Only the simulator trains by them, and imports this module: :mod:`fdcr_fast.ops` does not.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fdcr_fast.ops.operator import operator

CHANNELS = 16  # numbers of channels are multiples of it


def _check_images(name: str, x: Tensor) -> None:
    message = f"{name} must be float32 [N, H, W, C] with C a multiple of {CHANNELS}, got {x.dtype} {list(x.shape)}"
    fits = x.dim() == 4 and x.dtype == torch.float32 and x.shape[3] > 0 and x.shape[3] % CHANNELS == 0
    torch._check(fits, partial(str, message))


def _check_weight(weight: Tensor, dim: int, channels: int) -> None:
    sizes = list(weight.shape)
    message = f"weight must be float32 [O, 3, 3, I] with {channels} in dimension {dim}, got {weight.dtype} {sizes}"
    multiples = weight.dim() == 4 and all(size > 0 and size % CHANNELS == 0 for size in (sizes[0], sizes[3]))
    fits = multiples and sizes[1:3] == [3, 3] and sizes[dim] == channels and weight.dtype == torch.float32
    torch._check(fits, partial(str, message))


def _check(input: Tensor, weight: Tensor) -> None:
    _check_images("input", input)
    _check_weight(weight, 3, input.shape[3])


def _fake(input: Tensor, weight: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:3], weight.shape[0])


@operator(check=_check, fake=_fake)
def conv3x3(input: Tensor, weight: Tensor) -> Tensor:
    """The convolution.

    Args:
        input: ``[N, H, W, I]``.
        weight: ``[O, 3, 3, I]``.

    Returns:
        ``[N, H, W, O]``.
    """
    return channels_last(F.conv2d(channels_second(input), channels_second(weight), padding=1)).contiguous()


def _check_input_grad(output_grad: Tensor, weight: Tensor) -> None:
    _check_images("output_grad", output_grad)
    _check_weight(weight, 0, output_grad.shape[3])


def _fake_input_grad(output_grad: Tensor, weight: Tensor) -> Tensor:
    return output_grad.new_empty(*output_grad.shape[:3], weight.shape[3])


@operator(check=_check_input_grad, fake=_fake_input_grad)
def conv3x3_input_grad(output_grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient at the input of :func:`conv3x3`.

    Args:
        output_grad: ``[N, H, W, O]``, the gradient at its output.
        weight: ``[O, 3, 3, I]``.

    Returns:
        ``[N, H, W, I]``.
    """
    grad, filters = channels_second(output_grad), channels_second(weight)
    sizes = len(grad), filters.shape[1], *grad.shape[2:]
    return channels_last(conv2d_input(sizes, filters, grad, padding=1)).contiguous()


def _check_weight_grad(output_grad: Tensor, input: Tensor) -> None:
    _check_images("output_grad", output_grad)
    _check_images("input", input)
    torch._check(
        output_grad.shape[:3] == input.shape[:3], lambda: "output_grad and input must have the same samples and pixels"
    )


def _fake_weight_grad(output_grad: Tensor, input: Tensor) -> Tensor:
    return input.new_empty(output_grad.shape[3], 3, 3, input.shape[3])


@operator(check=_check_weight_grad, fake=_fake_weight_grad)
def conv3x3_weight_grad(output_grad: Tensor, input: Tensor) -> Tensor:
    """The gradient at the weight of :func:`conv3x3`.

    Args:
        output_grad: ``[N, H, W, O]``, the gradient at its output.
        input: ``[N, H, W, I]``.

    Returns:
        ``[O, 3, 3, I]``.
    """
    grad, images = channels_second(output_grad), channels_second(input)
    sizes = grad.shape[1], images.shape[1], 3, 3
    return channels_last(conv2d_weight(images, sizes, grad, padding=1)).contiguous()


def channels_second(x: Tensor) -> Tensor:
    """A view with the channels in dimension 1, as PyTorch has them."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """A view with the channels in the last dimension, as the operators have them."""
    return x.permute(0, 2, 3, 1)
