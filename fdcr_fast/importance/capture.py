"""Records, in one forward pass, what the layer rules need, and finds out where a rule may be used."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from fdcr_fast.importance.graph import reaches
from fdcr_fast.importance.rules import RULES


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, and the place in the autograd graph where its output's gradient arrives.

    ``of_data`` says that the input is known to come from the model's inputs, not from its parameters alone.
    """

    module: nn.Module
    input: Tensor
    version: int
    output_shape: torch.Size
    edge: GradientEdge | None
    of_data: bool

    @property
    def intact(self) -> bool:
        """Whether the input still holds what the layer saw."""
        return self.input._version == self.version


class Capture:
    """Context manager: while it is open, calls of the layers that have a rule are recorded by module name.

    ``inputs`` are what the model is about to be called with.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.calls: dict[str, list[Call]] = {}
        self._data = {_storage(x) for x in tree_leaves(inputs) if isinstance(x, Tensor)}
        self._of_data: set[Node] = set()
        self._modules = [(name, m) for name, m in model.named_modules() if _has_rule(m)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Capture:
        for name, module in self._modules:
            # Before the user's hooks: one that changes the output must not hide the layer's own.
            handle = module.register_forward_hook(self._record(name), with_kwargs=True, prepend=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            input = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            edge = get_gradient_edge(output) if output.requires_grad else None
            of_data = _storage(input) in self._data or reaches(input.grad_fn, self._of_data, set())
            if of_data and edge is not None:
                self._of_data.add(edge.node)
            call = Call(_as_called(module), input.detach(), input._version, output.shape, edge, of_data)
            self.calls.setdefault(name, []).append(call)

        return hook


def _as_called(module: nn.Module) -> nn.Module:
    """The module with the buffers that it has now: ``functional_call`` exchanges them only while it runs."""
    if not module._buffers:
        return module
    called = copy(module)
    called._buffers = dict(module._buffers)
    return called


def _has_rule(module: nn.Module) -> bool:
    """Exactly a known type, with exactly its own parameters (a parametrisation adds or replaces some)."""
    return type(module) in RULES and set(module._parameters) <= {"weight", "bias"} and "weight" in module._parameters


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
