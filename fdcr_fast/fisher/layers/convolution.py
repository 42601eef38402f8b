"""The rules of convolutions and transposed convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fdcr_fast import ops
from fdcr_fast.fisher.layers.table import entered
from fdcr_fast.ops.squared_grads import accumulation_dtype

# Groups with fewer channels than a cache line holds would read lines of all channels together again and again.
_FEW_CHANNELS = 8


def _batched(module: nn.Module, input: Tensor) -> bool:
    assert isinstance(module, _ConvNd)
    return input.dim() == len(module.kernel_size) + 2


@entered(nn.Conv1d, nn.Conv2d, nn.Conv3d, batched=_batched)
def convolution(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule of convolutions: padding other than so many zeros on both sides is applied to the input first."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dims = len(module.kernel_size)
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * dims
    if module.groups > 1 and module.out_channels < _FEW_CHANNELS * module.groups:
        input, grad_output = input.contiguous(), grad_output.contiguous()
    weight, bias = ops.sum_squared_grads_conv(
        grad_output, input, module.kernel_size, module.stride, padding, module.dilation, module.groups
    )
    return {"weight": weight, "bias": bias}


@entered(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, batched=_batched)
def transposed_convolution(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule of the convolution that leads back: its input is this layer's output gradient, and vice versa."""
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    assert isinstance(module.padding, tuple)
    dims = len(module.kernel_size)
    bias = grad_output.flatten(2).sum(2, dtype=accumulation_dtype(grad_output)).square_().sum(0)
    # What the windows cover, without the output padding: that may be as long as a stride, and then a window too many.
    covered = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(input.shape[2:], module.stride, module.dilation, module.kernel_size, strict=True)
    ]
    padding = module.padding
    output_padding = [n + 2 * p - c for n, p, c in zip(grad_output.shape[2:], padding, covered, strict=True)]
    if any(extra >= s for extra, s in zip(output_padding, module.stride, strict=True)):
        sides = [(p, p - extra) for p, extra in zip(padding, output_padding, strict=True)]
        grad_output = F.pad(grad_output, [side for pair in reversed(sides) for side in pair])
        padding = (0,) * dims
    weight, _ = ops.sum_squared_grads_conv(
        input, grad_output, module.kernel_size, module.stride, padding, module.dilation, module.groups
    )
    return {"weight": weight, "bias": bias}
