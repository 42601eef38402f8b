"""The rules of norm layers: those with statistics of the sample, and those with running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fdcr_fast import ops
from fdcr_fast.fisher.layers.table import entered

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _normalised_dims(module: nn.Module) -> int:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return len(module.normalized_shape)


@entered(nn.LayerNorm, own_dims=_normalised_dims)
def layer_norm(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule for statistics over the last dimensions, those of the parameters; others but the first are positions."""
    assert isinstance(module, nn.LayerNorm)
    return _over_last(module.normalized_shape, input, grad_output, None, module.eps)


@entered(nn.RMSNorm, own_dims=_normalised_dims)
def rms_norm(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule for mean squares, which are variances around zero."""
    assert isinstance(module, nn.RMSNorm)
    # PyTorch computes in at least float32, and the default eps is that dtype's.
    default = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    eps = default if module.eps is None else module.eps
    zero = input.new_zeros(()).expand(1, torch.Size(module.normalized_shape).numel())
    return _over_last(module.normalized_shape, input, grad_output, zero, eps)


@entered(nn.GroupNorm)
def group_norm(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule for statistics over a group of channels and all pixels, and parameters per channel."""
    assert isinstance(module, nn.GroupNorm)
    groups, channels = module.num_groups, module.num_channels // module.num_groups
    return _per_channel(input, grad_output, (groups, channels), None, None, module.eps)


def _batched(module: nn.Module, input: Tensor) -> bool:
    """Whether there is a dimension of samples: instance normalisation also takes one sample ``[C, *pixels]``."""
    return not any(isinstance(module, t) and input.dim() == dims for dims, t in enumerate(_INSTANCE_NORMS, 2))


@entered(*_INSTANCE_NORMS, *_BATCH_NORMS, batched=_batched)
def channel_norm(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule for statistics per channel: running ones, or (instance normalisation) those of the sample's pixels."""
    assert isinstance(module, _NormBase)
    if _uses_running_statistics(module):
        assert module.running_mean is not None
        assert module.running_var is not None
        shape = 1, module.num_features
        mean, variance = module.running_mean.view(shape), module.running_var.view(shape)
        return _per_channel(input, grad_output, shape, mean, variance, module.eps)
    return _per_channel(input, grad_output, (module.num_features, 1), None, None, module.eps)


def _uses_running_statistics(module: _NormBase) -> bool:
    return module.running_mean is not None and not module.training


def _over_last(
    shape: tuple[int, ...], input: Tensor, grad_output: Tensor, mean: Tensor | None, eps: float
) -> dict[str, Tensor]:
    size = len(input), -1, 1, torch.Size(shape).numel(), 1
    weight, bias = ops.sum_squared_grads_norm(grad_output.reshape(size), input.reshape(size), mean, None, eps)
    return {"weight": weight.view(shape), "bias": bias.view(shape)}


def _per_channel(
    input: Tensor,
    grad_output: Tensor,
    channels: tuple[int, int],
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> dict[str, Tensor]:
    size = len(input), 1, *channels, -1
    weight, bias = ops.sum_squared_grads_norm(grad_output.reshape(size), input.reshape(size), mean, variance, eps)
    return {"weight": weight.flatten(), "bias": bias.flatten()}
