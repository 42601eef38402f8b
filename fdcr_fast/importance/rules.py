"""Squared per-sample gradients of a layer from its input and the gradient at its output: one rule per layer type.

A rule gets the module, its input and the gradient of the summed losses at its output, both with the samples along
dimension 0, and returns ``{parameter name: sum over samples of the squared per-sample gradient}``. It is used where
the layer was called once and holds the only use of its parameters; everything else is done by ``per_sample``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import ops

Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

RULES: dict[type[nn.Module], Rule] = {}


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of exactly these types; a subclass may compute something else."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        return function

    return register


@rule(nn.Linear)
def linear(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """All dimensions between the first and the last are positions."""
    weight, bias = ops.sum_squared_grads_linear(
        grad_output.reshape(len(grad_output), -1, grad_output.shape[-1]),
        input.reshape(len(input), -1, input.shape[-1]),
    )
    return {"weight": weight, "bias": bias}


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Padding that is not the same number of zeros on both sides is applied to the input first."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    weight, bias = ops.sum_squared_grads_conv(
        grad_output, input, module.kernel_size, module.stride, padding, module.dilation, module.groups
    )
    return {"weight": weight, "bias": bias}
