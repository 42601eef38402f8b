"""Convolutions by the library's own operators, or as one product, where these are faster, in whatever calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fdcr_fast import _native
from fdcr_fast.ops.conv3x3 import (
    CHANNELS,
    channels_last,
    channels_second,
    conv3x3,
    conv3x3_input_grad,
    conv3x3_weight_grad,
)

Pair = tuple[int, int]

# Of fewer, what is done for all products together takes longer than what is saved.
FEWEST_TILES = 64  # of 2 by 2 pixels, of all samples together
FEWEST_PIXELS = 3  # of height and width
FEWEST_CHANNELS = 32  # of inputs and outputs
# PyTorch's own kernels go through the pixels of one image at a time. Where these are few and filters are many, as at
# the end of a ResNet, what they do for each filter takes longer than one product of all windows of a batch with all.
MOST_PIXELS = 16  # of an image's output
FEWEST_FILTERS = 512


def fast_convolutions() -> AbstractContextManager[object]:
    """A context in which convolutions go through :mod:`fdcr_fast.ops.conv3x3`, or become products, where that pays.

    Models, their modules and whoever calls ``torch.conv2d`` stay as they are, and get what they would have got, but for
    rounding. The choice follows from the arguments alone: one of images and filters lies channels last, as the output
    then does, and Winograd's are of float32, as the processor multiplies bfloat16 faster than it transforms. Without
    compiled operators there is none.
    """
    return _FastConvolutions() if _native.loaded else nullcontext()


class _FastConvolutions(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function or, for some convolutions, what is faster."""
        kwargs = kwargs or {}
        found = _faster(*args, **kwargs) if func is torch.conv2d else None
        return func(*args, **kwargs) if found is None else found


def _faster(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution where an operator or one product computes it faster; None for all others."""
    dtype = _dtype_of([input, weight] if bias is None else [input, weight, bias])
    if dtype is None or _is_observed() or input.dim() != 4 or weight.dim() != 4 or isinstance(padding, str):
        return None
    if not any(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in (input, weight)):
        return None
    samples, channels, height, width = input.shape
    outputs, inputs, *kernel = weight.shape
    if channels != inputs or groups != 1 or _pair(dilation) != (1, 1) or not (bias is None or bias.shape == (outputs,)):
        return None
    stride, padding = _pair(stride), _pair(padding)
    if dtype == torch.float32 and (kernel, stride, padding) == ([3, 3], (1, 1), (1, 1)):
        tiles = samples * ((height + 1) // 2) * ((width + 1) // 2)
        if (
            inputs % CHANNELS == outputs % CHANNELS == 0
            and min(inputs, outputs) >= FEWEST_CHANNELS
            and tiles >= FEWEST_TILES
            and min(height, width) >= FEWEST_PIXELS
        ):
            return _with_bias(_Convolution.apply(input, weight), bias)
    if min(stride) < 1 or min(padding) < 0:
        return None
    rows, columns = pixels_of((height, width), kernel, stride, padding)
    if min(rows, columns, samples, inputs) < 1 or rows * columns > MOST_PIXELS or outputs < FEWEST_FILTERS:
        return None
    return _with_bias(conv_product(input.to(dtype), weight.to(dtype), stride, padding), bias)


def _dtype_of(given: Sequence[Any]) -> torch.dtype | None:
    """What PyTorch computes in, of tensors with nothing to them but numbers in memory; None of others."""
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else torch.float32
    known = (torch.float32, torch.bfloat16) if mixed else (torch.float32,)
    plain = all(
        type(x) in (Tensor, nn.Parameter) and x.dtype in known and x.is_cpu and x.layout == torch.strided for x in given
    )
    return dtype if plain and dtype in known else None


def _is_observed() -> bool:
    """Whether something looks at the functions that are called: a compiler, ``torch.func`` or forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)


def _pair(setting: Any) -> Any:
    return (setting, setting) if isinstance(setting, int) else tuple(setting)


class _Convolution(torch.autograd.Function):
    """The convolution of images ``[N, I, H, W]`` with filters ``[O, I, 3, 3]``, both in any layout."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return owner(channels_second(conv3x3(channels_last(input), channels_last(weight))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # whoever wants gradients of gradients gets PyTorch's
            ones = [1, 1]
            found = torch.ops.aten.convolution_backward(
                grad, input, weight, None, ones, ones, ones, False, [0, 0], 1, [*wanted, False]
            )
            return found[0], found[1]
        return (
            channels_second(conv3x3_input_grad(channels_last(grad), channels_last(weight))) if wanted[0] else None,
            channels_second(conv3x3_weight_grad(channels_last(grad), channels_last(input))) if wanted[1] else None,
        )


def owner(view: Tensor) -> Tensor:
    """The same numbers in a tensor that is no view, as which they can be changed in place, as by a ReLU."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def pixels_of(size: Any, kernel: Any, stride: Pair, padding: Pair) -> Pair:
    """Height and width of the output."""
    height, width = ((size[d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in range(2))
    return height, width


def conv_product(input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The convolution of images ``[N, I, H, W]`` with filters ``[O, I, h, w]`` of one dtype, without groups.

    Its gradient at the input sums products that were rounded to the dtype: in bfloat16 its error is 1.4 times that of
    one rounding. In float32 the error of its gradient at the filters is up to twice PyTorch's, 3e-7.
    """
    output: Tensor = _Product.apply(input, weight, stride, padding)
    return output


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
