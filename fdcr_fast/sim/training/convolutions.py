"""Convolutions of 3 by 3 taps by the library's own operators, where these are faster, in whatever calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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

# Of fewer, what is done for all products together takes longer than what is saved.
FEWEST_TILES = 64  # of 2 by 2 pixels, of all samples together
FEWEST_PIXELS = 3  # of height and width
FEWEST_CHANNELS = 32  # of inputs and outputs


def fast_convolutions() -> AbstractContextManager[object]:
    """A context in which convolutions go through :mod:`fdcr_fast.ops.conv3x3` where their shapes say that it pays.

    Models, their modules and whoever calls ``torch.conv2d`` stay as they are, and get what they would have got, but for
    rounding. The choice follows from the arguments alone, of which one lies channels last, as the output then does;
    without compiled operators there is none.
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
        if func is torch.conv2d and _pays(*args, **kwargs):
            return _convolved(*args, **kwargs)
        return func(*args, **kwargs)


def _pays(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution is one that the operators compute, of a size for which they are faster."""
    if torch.compiler.is_compiling() or not (_is_plain(input) and _is_plain(weight)):
        return False
    if input.dim() != 4 or weight.shape[2:] != (3, 3) or groups != 1:
        return False
    if bias is not None and not (_is_plain(bias) and bias.shape == weight.shape[:1]):
        return False
    if not any(x.is_contiguous(memory_format=torch.channels_last) for x in (input, weight)):
        return False
    if (_pair(stride), _pair(padding), _pair(dilation)) != ((1, 1), (1, 1), (1, 1)):
        return False
    samples, channels, height, width = input.shape
    outputs, inputs = weight.shape[:2]
    tiles = samples * ((height + 1) // 2) * ((width + 1) // 2)
    return (
        channels == inputs
        and inputs % CHANNELS == outputs % CHANNELS == 0
        and min(inputs, outputs) >= FEWEST_CHANNELS
        and tiles >= FEWEST_TILES
        and min(height, width) >= FEWEST_PIXELS
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor with nothing to it but numbers in memory."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided


def _pair(setting: Any) -> Any:
    return (setting, setting) if isinstance(setting, int) else tuple(setting)


def _convolved(input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    output: Tensor = _Convolution.apply(input, weight)
    return output if bias is None else output + bias.view(-1, 1, 1)


class _Convolution(torch.autograd.Function):
    """The convolution of images ``[N, I, H, W]`` with filters ``[O, I, 3, 3]``, both in any layout."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        output = conv3x3(channels_last(input), channels_last(weight))
        # A view could not be changed in place, as by ReLU(inplace=True).
        sizes, strides = channels_second(output).shape, channels_second(output).stride()
        return output.new_empty(0).set_(output.untyped_storage(), 0, sizes, strides)

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
