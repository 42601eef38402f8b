"""The definition of the diagonal empirical Fisher, one sample at a time in float64."""

import copy

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map


def slices(tree, i):
    return tree_map(lambda x: (x.double() if x.is_floating_point() else x)[i : i + 1], tree)


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
