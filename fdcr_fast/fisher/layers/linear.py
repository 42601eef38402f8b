"""The rule of linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from fdcr_fast import ops
from fdcr_fast.fisher.layers.table import entered


def _has_rows(module: nn.Module) -> bool:
    """Whether weight and bias have the shapes of a linear layer's; others are broadcast."""
    assert isinstance(module, nn.Linear)
    return module.weight.dim() == 2 and (module.bias is None or module.bias.shape == module.weight.shape[:1])


@entered(nn.Linear, own_dims=lambda module: 1, holds=_has_rows)
def linear(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule of linear layers: all dimensions between the first and the last are positions."""
    weight, bias = ops.sum_squared_grads_linear(
        grad_output.reshape(len(grad_output), -1, grad_output.shape[-1]),
        input.reshape(len(input), -1, input.shape[-1]),
    )
    return {"weight": weight, "bias": bias}
