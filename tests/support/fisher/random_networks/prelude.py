"""What the code of random networks is written with: imports, layers and functions of the kinds that people write."""

import math
import types
import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Affine",
    "ComputedAgain",
    "Doubled",
    "F",
    "Gained",
    "LoRA",
    "Residual",
    "Reversed",
    "RootOfSquares",
    "ScaledLinear",
    "ScaledWeight",
    "SimpleNamespace",
    "StandardisedConv2d",
    "TripledInPlace",
    "checkpoint",
    "functional_call",
    "math",
    "nn",
    "old_spectral_norm",
    "old_weight_norm",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "parametrizations",
    "parametrize",
    "perturbed",
    "randomise",
    "torch",
    "types",
]


class Doubled(torch.autograd.Function):
    """Of the old form, which vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Reversed(torch.autograd.Function):
    """A gradient that is not that of the function (domain adaptation), with a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad


class Affine(torch.autograd.Function):
    """Computes the weight's gradient of all rows by itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return grad @ weight, rows


class TripledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class RootOfSquares(torch.autograd.Function):
    """Two outputs, one of them without a gradient."""

    @staticmethod
    def forward(ctx, x):
        root = (x * x + 1).sqrt()
        above = x > 0
        ctx.save_for_backward(x, root)
        ctx.mark_non_differentiable(above)
        return root, above

    @staticmethod
    def backward(ctx, grad, _):
        x, root = ctx.saved_tensors
        return grad * x / root


class ComputedAgain(torch.autograd.Function):
    """A checkpoint of one's own, as reversible networks have it: the backward pass runs another one."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.part = part
        ctx.save_for_backward(x)
        with torch.no_grad():
            return part(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.part(x), grad)
        return x.grad, None


class ScaledLinear(nn.Linear):
    """A Linear by type, but not by what it computes."""

    def forward(self, input):
        return F.linear(input, self.weight * 2, self.bias).neg()


class StandardisedConv2d(nn.Conv2d):
    def forward(self, input):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, w / (w.square().mean((1, 2, 3), keepdim=True) + 1).sqrt(), self.bias)


class LoRA(nn.Linear):
    def __init__(self, features, outputs, rank):
        super().__init__(features, outputs)
        self.a, self.b = nn.Parameter(torch.zeros(rank, features)), nn.Parameter(torch.zeros(outputs, rank))
        self.weight.requires_grad_(False)

    def forward(self, input):
        return super().forward(input) + 2 * (input @ self.a.t() @ self.b.t())


class Residual(nn.Sequential):
    def forward(self, input):
        h = super().forward(input)
        h += input
        return h


class Gained(nn.Module):
    """The gain of a layer's output (DoRA, LayerScale), as a parameter of a module that wraps the layer."""

    def __init__(self, layer, features):
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.ones(features))

    def forward(self, input):
        return self.layer(input).mul_(self.gain)


class ScaledWeight(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight):
        return weight * self.gain.exp()


def _old(norm, layer):
    with warnings.catch_warnings(), torch.no_grad():  # a weight with a graph could not be copied
        warnings.simplefilter("ignore")
        return norm(layer)


def old_weight_norm(layer):
    return _old(nn.utils.weight_norm, layer)


def old_spectral_norm(layer):
    return _old(nn.utils.spectral_norm, layer)


@torch.no_grad()
def randomise(model):
    """Nothing is left at zero or one, where faults could hide."""
    for name, p in model.named_parameters():
        if "original" not in name and "_orig" not in name:  # the power iteration of a spectral norm knows these values
            p.normal_(std=max(1, p[0].numel() if p.dim() > 1 else 1) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@torch.no_grad()
def perturbed(model, share=1):
    """A state of the model of other values; tied tensors stay tied. With a ``share``, of every so many names."""
    other = {}
    state = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in other:
            moved = x.detach().clone()
            if isinstance(x, nn.Parameter) and x.is_floating_point():
                moved += 0.3 * torch.randn_like(x)
            elif name.endswith(("running_mean", "running_var")):
                moved *= 1.5
            other[id(x)] = moved
        state[name] = other[id(x)]
    return dict(list(state.items())[::share])
