"""Other ways to the same diagonal Fisher, each as well written as we can, and a plain gradient for scale.

A contender is made once from a problem, outside the measured time, and then called for
``sum_n grad_n^2 / N`` flattened in the order of ``named_parameters()``. One that cannot do a model raises an
exception that says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fdcr_fast
from benchmarks.models import Problem

Contender = Callable[[], Tensor]

_CHUNK_BYTES = 512 << 20  # per-sample gradients alive at one time, for the peers that can cut a batch


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def batch_gradient(problem: Problem) -> Contender:
    """One forward and backward pass of the batch. Not a Fisher: the price of one is measured in these."""
    parameters = list(problem.model.parameters())

    def run() -> Tensor:
        loss = F.cross_entropy(problem.model(problem.inputs), problem.targets)
        return flat(torch.autograd.grad(loss, parameters))

    return run


def ours(problem: Problem) -> Contender:
    return lambda: fdcr_fast.diagonal_fisher(problem.model, (problem.inputs, problem.targets))


def one_by_one(problem: Problem) -> Contender:
    parameters = list(problem.model.parameters())

    def run() -> Tensor:
        sums = [torch.zeros_like(p) for p in parameters]
        for x, y in zip(problem.inputs.split(1), problem.targets.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(problem.model(x), y), parameters)
            for total, g in zip(sums, grads, strict=True):
                total.addcmul_(g, g)
        return flat(sums) / len(problem.targets)

    return run


def torch_func(problem: Problem) -> Contender:
    """``vmap(grad)`` in chunks."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(problem.model, params, (x.unsqueeze(0),)), y.unsqueeze(0))

    grads_of = vmap(grad(loss), in_dims=(None, 0, 0))
    chunk = max(1, _CHUNK_BYTES // sum(p.nbytes for p in parameters.values()))

    def run() -> Tensor:
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        batches = zip(problem.inputs.split(chunk), problem.targets.split(chunk), strict=True)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
            for x, y in batches:
                for name, g in grads_of(parameters, x, y).items():
                    sums[name] += g.square_().sum(0)
        return flat(sums.values()) / len(problem.targets)

    return run


def backpack(problem: Problem) -> Contender:
    from backpack import backpack as backprop_with
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model = extend(copy.deepcopy(problem.model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = list(model.parameters())

    def run() -> Tensor:
        with backprop_with(SumGradSquared()):
            loss(model(problem.inputs), problem.targets).backward()
        squares = [p.__dict__.pop("sum_grad_squared", None) for p in parameters]
        model.zero_grad()
        without = {id(p) for p, s in zip(parameters, squares, strict=True) if s is None}
        if kinds := {type(m).__name__ for m in model.modules() for p in m._parameters.values() if id(p) in without}:
            raise NotImplementedError(f"has no rule for {', '.join(kinds)}")
        return flat(squares) / len(problem.targets)

    return run


def opacus(problem: Problem) -> Contender:
    from opacus.grad_sample import GradSampleModule

    # strict=False admits modules with buffers, such as a table of positions.
    model = GradSampleModule(copy.deepcopy(problem.model), loss_reduction="sum", strict=False)
    model.train()  # it takes no per-sample gradients in eval mode; nothing here depends on the mode
    parameters = list(model.parameters())

    def run() -> Tensor:
        F.cross_entropy(model(problem.inputs), problem.targets, reduction="sum").backward()
        squares = [p.grad_sample.square_().sum(0) for p in parameters]
        model.zero_grad()
        return flat(squares) / len(problem.targets)

    return run


def hooks_bmm(problem: Problem) -> Contender:
    """Layer inputs and output gradients by hooks, per-sample gradients by unfold and batched products."""
    model = copy.deepcopy(problem.model)
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    calls: dict[nn.Module, tuple[Tensor, Any]] = {}
    for layer in layers:
        layer.register_forward_hook(
            lambda m, args, output: calls.__setitem__(m, (args[0].detach(), get_gradient_edge(output)))
        )
    leaf = {id(p): (m, name) for m in layers for name, p in m.named_parameters(recurse=False)}
    order = [leaf[id(p)] for p in model.parameters()]

    def run() -> Tensor:
        losses = F.cross_entropy(model(problem.inputs), problem.targets, reduction="sum")
        grads = torch.autograd.grad(losses, [calls[m][1] for m in layers])
        squares = {m: _squares(m, calls[m][0], g) for m, g in zip(layers, grads, strict=True)}
        calls.clear()
        return flat(squares[m][name] for m, name in order) / len(problem.targets)

    return run


def _squares(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Sums over the samples of the squared per-sample gradients of one layer."""
    n = len(x)
    if isinstance(layer, nn.Linear) and x.dim() == 2:
        return {"weight": g.square().T @ x.square(), "bias": g.square().sum(0)}
    if isinstance(layer, nn.Linear):
        weight, bias = torch.bmm(g.transpose(1, 2), x), g.sum(1)
    elif isinstance(layer, nn.Conv2d):
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        columns = columns.view(n * layer.groups, -1, columns.shape[-1])
        weight = torch.bmm(g.reshape(n * layer.groups, -1, columns.shape[-1]), columns.transpose(1, 2))
        weight, bias = weight.view(n, *layer.weight.shape), g.sum((2, 3))
    elif isinstance(layer, nn.LayerNorm):
        normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        weight, bias = (g * normal).sum(1), g.sum(1)
    elif isinstance(layer, nn.BatchNorm2d):
        normal = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
        weight, bias = (g * normal).sum((2, 3)), g.sum((2, 3))
    elif isinstance(layer, nn.Embedding):
        rows = x + torch.arange(n).unsqueeze(1) * layer.num_embeddings
        weight = g.new_zeros(n * layer.num_embeddings, g.shape[-1]).index_add_(0, rows.flatten(), g.flatten(0, 1))
        return {"weight": weight.square_().view(n, *layer.weight.shape).sum(0)}
    else:
        raise NotImplementedError(f"no rule for {type(layer).__name__}")
    return {"weight": weight.square_().sum(0), "bias": bias.square_().sum(0)}


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "BackPACK": backpack,
    "Opacus": opacus,
    "torch.func": torch_func,
    "one by one": one_by_one,
    "hooks + bmm": hooks_bmm,
}
