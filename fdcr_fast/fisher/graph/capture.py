"""The record of a forward pass that the layer rules need: the calls of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fdcr_fast.fisher.graph.provenance import Axis
from fdcr_fast.fisher.layers import RULES, Rule


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, and the place in the autograd graph where its output's gradient arrives.

    Attributes:
        params: The tensors that stood for the layer's parameters.
        settings: The layer's settings in the call.
        versions: The tensors that the layer read, its input and buffers, with their versions then.
    """

    module: nn.Module
    rule: Rule
    params: Mapping[str, Tensor | None]
    input: Tensor
    edge: GradientEdge
    settings: tuple[Any, ...]
    versions: tuple[tuple[Tensor, int], ...]

    @property
    def intact(self) -> bool:
        """Whether the layer and what it read are still as they were in the call."""
        return self.settings == _settings(self.module) and all(x._version == version for x, version in self.versions)

    def takes_samples_along(self, axis: Axis, n: int) -> bool:
        """Whether the layer's rule can be given samples that lie so in the first dimensions."""
        leading = self.rule.leading_dims(self.module, self.input)
        if self.input.numel() == 0:
            return False
        if leading == 0:
            return n == 1
        if self.rule.own_dims is None:
            return axis == (0, 1) and len(self.input) == n
        return axis.dim < leading

    def has_rows(self, n: int) -> bool:
        """Whether the samples may be the rows of the input."""
        return len(self.input) == n

    def sum_squares(self, grad: Tensor, axis: Axis, n: int) -> dict[str, Tensor]:
        """The sums of squares by the layer's own names, given the gradient of the summed losses at the output."""
        input, grad = (self._samples_first(x, axis, n) for x in (self.input, grad))
        return self.rule.sum_squares(self.module, input, grad)

    def _samples_first(self, x: Tensor, axis: Axis, n: int) -> Tensor:
        if self.rule.leading_dims(self.module, self.input) == 0:
            return x.unsqueeze(0)
        if axis == (0, 1) and len(x) == n:
            return x
        apart: Tensor = x.unflatten(axis.dim, (-1, n, axis.inner))
        return apart.movedim(axis.dim + 1, 0)


class Capture:
    """A context manager that records the calls of the layers that have a rule, by module name.

    The layers' own forward pass is recorded, inside of all hooks, which may change what goes in and comes out. A call
    that no gradient leads to, or that a transformation of ``torch.func`` makes, is None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[Call | None]] = {}
        self._layers = [
            (name, module, rule)
            for name, module in model.named_modules()
            if (rule := RULES.get(type(module))) is not None and rule.holds_for(module)
        ]

    def __enter__(self) -> Capture:
        for name, module, rule in self._layers:
            vars(module)["forward"] = partial(self._forward, name, module, rule, module.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, module, _ in self._layers:
            vars(module).pop("forward", None)

    def _forward(
        self, name: str, module: nn.Module, rule: Rule, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        output = forward(*args, **kwargs)
        calls = self.calls.setdefault(name, [])
        if not output.requires_grad or is_functorch_wrapped_tensor(output):
            calls.append(None)
            return output
        if output._is_view():
            # A change in place of a view would move it to another node of the graph, past the one recorded here.
            output = torch.ops.aten._unsafe_view.default(output, output.shape)
        input = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).detach()
        read = [input, *(buffer for buffer in module._buffers.values() if buffer is not None)]
        versions = tuple((x, x._version) for x in read)
        edge = get_gradient_edge(output)
        calls.append(Call(module, rule, dict(module._parameters), input, edge, _settings(module), versions))
        return output


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """The layer's constants, which those of PyTorch's name, and the numbers and the text in it, for those of others."""
    simple = (x for x in vars(layer).values() if isinstance(x, int | float | str))
    return *(getattr(layer, name, None) for name in getattr(layer, "__constants__", ())), *simple
