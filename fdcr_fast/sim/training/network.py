"""Which models the operators of small networks can compute."""

from __future__ import annotations

import torch
from torch import nn

from fdcr_fast.ops.networks import NetworkLayer


def network_layers(model: nn.Module) -> list[int] | None:
    """The model as ``layers`` of the operators of small networks, or None where it is something else.

    That is an ``nn.Sequential`` of plain ``Conv2d`` (stride 1, zero padding), ``MaxPool2d(2)`` after a convolution,
    ``ReLU``, ``Flatten`` and ``Linear``, the last of which is last, with float32 parameters that are all trained.
    """
    if type(model) is not nn.Sequential or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    layers: list[NetworkLayer] = []
    parameters: list[nn.Parameter] = []
    flat = False
    for module in model:
        last = layers[-1] if layers else None
        if type(module) is nn.Conv2d and not flat and _is_plain_convolution(module):
            layers.append(NetworkLayer(module.out_channels, *module.kernel_size, *module.padding))
        elif type(module) is nn.Linear and flat:
            layers.append(NetworkLayer(module.out_features))
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) is nn.ReLU and last is not None:
            layers[-1] = last._replace(relu=1)
        elif type(module) is nn.MaxPool2d and last is not None and not (flat or last.pool) and _halves(module):
            layers[-1] = last._replace(pool=1)  # before or after ReLU is the same
        else:
            return None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[-1] = layers[-1]._replace(bias=int(module.bias is not None))
            parameters += module.parameters()
    trained = all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    once = [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    ends = len(model) > 0 and type(model[-1]) is nn.Linear
    if not (trained and once and ends):
        return None
    return [number for layer in layers for number in layer]


def _is_plain_convolution(module: nn.Conv2d) -> bool:
    strided = module.stride != (1, 1) or module.dilation != (1, 1) or module.groups != 1
    return not strided and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _halves(module: nn.MaxPool2d) -> bool:
    sizes = [x if isinstance(x, tuple) else (x, x) for x in (module.kernel_size, module.stride)]
    plain = module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))
    return sizes == [(2, 2)] * 2 and plain and not (module.ceil_mode or module.return_indices)
