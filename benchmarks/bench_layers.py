"""Each layer rule against the weight gradient of the framework: where the time of a Fisher goes.

python -m pytest benchmarks/bench_layers.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import PROBLEMS, problem
from benchmarks.tables import Report
from fdcr_fast.fisher.layers import RULES

_CHECKED_SAMPLES = 2
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

REPORT = Report(
    "layers",
    "Layer rules",
    "python -m pytest benchmarks/bench_layers.py",
    """\
*plain*: the framework's batch gradient of the same weights and biases from the same input and output
gradient (oneDNN for convolutions, a matrix product for linear layers). *ratio*: our squared per-sample
gradients over it, with the quartiles within the rounds. *GFLOP/s*: two per multiply-add of either.""",
)

# Shapes beside those of the models.
SHAPES = {
    "pointwise": (nn.Conv2d(64, 64, 1), (64, 64, 16, 16)),
    "7x7, stride 2": (nn.Conv2d(3, 64, 7, 2, 3), (16, 3, 112, 112)),
    "dilated": (nn.Conv2d(32, 32, 3, padding=4, dilation=4), (64, 32, 32, 32)),
    "depthwise 3x3": (nn.Conv2d(128, 128, 3, padding=1, groups=128), (64, 128, 16, 16)),
    "depthwise 5x5, stride 2": (nn.Conv2d(96, 96, 5, 2, 2, groups=96), (64, 96, 28, 28)),
    "32 groups": (nn.Conv2d(128, 128, 3, padding=1, groups=32), (64, 128, 16, 16)),
    "1 channel to 1": (nn.Conv2d(1, 1, 3), (256, 1, 28, 28)),
    "sequence": (nn.Conv1d(64, 64, 5), (64, 64, 256)),
    "volume": (nn.Conv3d(8, 16, 3, padding=1), (16, 8, 16, 16, 16)),
    "linear, T = 1, wide": (nn.Linear(2048, 2048), (128, 2048)),
    "linear, T = 1, narrow": (nn.Linear(84, 10), (256, 84)),
    "linear, T = 16": (nn.Linear(256, 256), (128, 16, 256)),
    "linear, T = 128": (nn.Linear(256, 1024), (32, 128, 256)),
}


def layers_of(name: str) -> list[tuple[nn.Module, Tensor, int]]:
    """Different layers that have a rule, an input of each, and how often it occurs."""
    if name in SHAPES:
        layer, shape = SHAPES[name]
        return [(layer, torch.randn(shape), 1)]
    found: dict[tuple[str, torch.Size], tuple[nn.Module, Tensor, int]] = {}

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        key = repr(module), args[0].shape
        layer, input, count = found.get(key, (module, args[0], 0))
        found[key] = layer, input, count + 1

    whole = problem(name)
    for module in whole.model.modules():
        if type(module) in RULES:
            module.register_forward_hook(record)
    with torch.no_grad():
        whole.model(whole.inputs)
    return list(found.values())


def check(layer: nn.Module, input: Tensor, grad_output: Tensor) -> None:
    """The rule against one sample at a time in float64."""
    squares = RULES[type(layer)].sum_squares(layer, input, grad_output)
    double = copy.deepcopy(layer).double()
    for name, p in double.named_parameters():
        expected = torch.zeros_like(p)
        for x, g in zip(input.split(1), grad_output.split(1), strict=True):
            output = double(x.double() if x.is_floating_point() else x)
            expected += torch.autograd.grad(output, p, g.double())[0] ** 2
        got = squares[name].to_dense() if squares[name].is_sparse else squares[name]
        assert (got - expected).norm() < 1e-5 * expected.norm(), (layer, name)


def cases() -> Iterator[tuple[str, int]]:
    """Every name with the numbers of its layers, which are found without computing anything."""
    for name in (*PROBLEMS, *SHAPES):
        with torch.device("meta"):
            yield from ((name, index) for index in range(len(layers_of(name))))


@pytest.mark.parametrize(("name", "index"), cases())
def test_layers(bench, name, index):
    layer, input, count = layers_of(name)[index]
    output = layer(input)
    grad_output = torch.randn_like(output)
    rule = RULES[type(layer)]
    check(layer, input[:_CHECKED_SAMPLES], grad_output[:_CHECKED_SAMPLES])
    contenders = {
        "ours": partial(rule.sum_squares, layer, input, grad_output),
        "plain": partial(torch.autograd.grad, output, list(layer.parameters()), grad_output, retain_graph=True),
    }
    times = bench.compare(contenders, share=0.025).times
    plain, ours = times["plain"], times["ours"]
    low, high = ours.spread_over(plain)
    cells = {
        "where": name,
        "layer": str(layer),
        "input": "x".join(map(str, input.shape)),
        "times": str(count),
        "plain, ms": f"{plain.median * 1e3:.2f}",
        "ours, ms": f"{ours.median * 1e3:.2f}",
        "ratio": f"**{ours.over(plain):.2f}** ({low:.2f} to {high:.2f})",
    }
    if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        positions = output.numel() // (output.shape[1] if isinstance(layer, CONVOLUTIONS) else output.shape[-1])
        flops = 2 * positions * layer.weight.numel()
        cells["GFLOP/s, plain and ours"] = f"{flops / plain.median / 1e9:.0f}, {flops / ours.median / 1e9:.0f}"
    bench.add(f"{name}: {layer} {tuple(input.shape)}", cells, {key: t.seconds for key, t in times.items()})
