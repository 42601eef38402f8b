"""The definition of the diagonal empirical Fisher, one sample at a time in float64."""

import copy
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

original_batch_norm = F.batch_norm


def batch_norm_by_formula(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Of running statistics; PyTorch's own gradient is wrong where a dimension of size 1 hides the layout of images."""
    if training:
        return original_batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    shape = (1, -1, *[1] * (x.dim() - 2))
    x = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    return x if weight is None else x * weight.view(shape) + bias.view(shape)


# A context manager and a decorator.
exact_batch_norm = patch("torch.nn.functional.batch_norm", batch_norm_by_formula)


def slices(tree, i):
    return tree_map(lambda x: (x.double() if x.is_floating_point() else x)[i : i + 1], tree)


@exact_batch_norm
def fisher_one_by_one(model, inputs, targets, loss=None, training=False):
    """Mean over the samples of the squared gradient of each sample's loss."""
    model = copy.deepcopy(model).double()
    model.requires_grad_(True)
    model.train(training)
    loss = loss or (lambda output, target: F.cross_entropy(output, target, reduction="sum"))
    total = 0
    n = len(targets)
    for i in range(n):
        x = slices(inputs, i)
        output = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
        grads = torch.autograd.grad(loss(output, slices(targets, i)), list(model.parameters()))
        total = total + torch.cat([g.to_dense().flatten() for g in grads]) ** 2
    return total / n
