"""Convolutions as products of matrices: of all windows of a batch with the filters.

PyTorch's own kernels go through the pixels of one image at a time. Where these are few and filters are many, as at the
end of a ResNet, what they do for each filter takes longer than the products, most of all in the filters' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast.ops.conv3x3 import channels_last, channels_second

Pair = tuple[int, int]


def pixels_of(size: Any, kernel: Any, stride: Pair, padding: Pair) -> Pair:
    """Height and width of the output."""
    height, width = ((size[d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in range(2))
    return height, width


def conv_product(input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The convolution of images ``[N, I, H, W]`` with filters ``[O, I, h, w]`` of one dtype, without groups.

    Its gradient at the input sums products that were rounded to the dtype: in bfloat16 its error is 1.4 times that of
    one rounding, all other errors are at most PyTorch's.
    """
    output: Tensor = _Product.apply(input, weight, stride, padding)
    return output


def owner(view: Tensor) -> Tensor:
    """The same numbers in a tensor that is no view: that could not be changed in place, as by ``ReLU(inplace=True)``."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _windows(input: Tensor, kernel: Any, stride: Pair, padding: Pair) -> Tensor:
    """``[N, height, width, h, w, I]``, one for each pixel of the output: a view of the padded images."""
    padded = F.pad(channels_last(input), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    samples, rows, columns, channels = padded.stride()
    height, width = pixels_of(input.shape[2:], kernel, stride, padding)
    sizes = len(input), height, width, *kernel, input.shape[1]
    return padded.as_strided(sizes, (samples, rows * stride[0], columns * stride[1], rows, columns, channels))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        filters = channels_last(weight).flatten(1)
        windows = _windows(input, weight.shape[2:], stride, padding)
        return owner(channels_second(F.linear(windows.flatten(3), filters)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # whoever wants gradients of gradients gets PyTorch's
            found = torch.ops.aten.convolution_backward(
                grad, input, weight, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, [*wanted, False]
            )
            return found[0], found[1], None, None
        given, filters = channels_last(grad).flatten(0, 2), channels_last(weight)
        input_grad = weight_grad = None
        if wanted[0]:
            input_grad = _at_input(given @ filters.flatten(1), input, weight, ctx.stride, ctx.padding)
        if wanted[1]:
            windows = _windows(input, weight.shape[2:], ctx.stride, ctx.padding)
            weight_grad = channels_second((given.t() @ windows.flatten(3).flatten(0, 2)).view(filters.shape))
        return input_grad, weight_grad, None, None


def _at_input(grads: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The sums of the windows' gradients where these overlap, in float32 at least."""
    samples, channels, height, width = input.shape
    kernel = weight.shape[2:]
    rows, columns = pixels_of((height, width), kernel, stride, padding)
    grads = grads.view(samples, rows, columns, *kernel, channels)
    dtype = torch.promote_types(grads.dtype, torch.float32)
    sums = grads.new_zeros(samples, height + 2 * padding[0], width + 2 * padding[1], channels, dtype=dtype)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            reached = sums[:, i : i + rows * stride[0] : stride[0], j : j + columns * stride[1] : stride[1]]
            reached += grads[:, :, :, i, j]
    inner = sums[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return channels_second(inner.to(grads.dtype))
