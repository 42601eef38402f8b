"""Entries: the functions by which parameters outside of layers with rules enter the graph in simple ways.

Tokens, positions and scales of transformers, the packed projections of attention, layers that are no ``nn.Linear`` but
compute its function. Such a parameter, perhaps transposed or reshaped, is an argument of one function, whose result
grows linearly with it; the graph tells where the samples lie in that result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fdcr_fast import ops
from fdcr_fast.fisher.graph.autograd import Graph
from fdcr_fast.fisher.graph.provenance import Axis


@dataclass(frozen=True)
class Term:
    """An argument that is broadcast to the result's shape, times a factor, and added to what else there is.

    ``shape`` is that of the argument, with as many dimensions as the result. No factor is a factor of 1.
    """

    factor: Tensor | float | None
    shape: Sequence[int]

    def takes_samples_along(self, axis: Axis) -> bool:
        """Whether every sample has all of the argument."""
        return axis.dim < len(self.shape) and self.shape[axis.dim] == 1

    def sum_squares(self, grad: Tensor, axis: Axis, n: int) -> Tensor:
        """The sums of squares of the argument's elements, in any shape."""
        x = _samples_first(grad if self.factor is None else grad * self.factor, axis, n)
        shape = self.shape if n == 1 else (*self.shape[: axis.dim], 1, *self.shape[axis.dim :])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if summed := [dim for dim, size in enumerate(shape, 1) if size == 1]:
            x = x.sum(summed)
        return x.square().sum(0)


@dataclass(frozen=True)
class RightFactor:
    """An argument that is the right factor of a matrix product, ``left @ argument``."""

    left: Tensor

    def takes_samples_along(self, axis: Axis) -> bool:
        """Whether every sample has all of the argument."""
        return axis.dim == 0

    def sum_squares(self, grad: Tensor, axis: Axis, n: int) -> Tensor:
        """The sums of squares of the argument's elements, in its shape."""
        grad, left = (_samples_first(x, axis, n).flatten(1, -2) for x in (grad, self.left))
        return ops.sum_squared_grads_linear(grad, left)[0].t()


def _samples_first(x: Tensor, axis: Axis, n: int) -> Tensor:
    """The tensor as ``[n, ...]``, with two dimensions for that of the samples: what lies around them and in between."""
    if n == 1:
        return x.unsqueeze(0)
    apart: Tensor = x.unflatten(axis.dim, (-1, n, axis.inner))
    return apart.movedim(axis.dim + 1, 0)


# What an argument of a node is, given its number and shape; None where it is something else.
Reader = Callable[[Any, int, Sequence[int]], "Term | RightFactor | None"]


def _saved(node: Any, name: str) -> Tensor:
    saved: Tensor = getattr(node, f"_saved_{name}")
    return saved.detach()


def _sum(node: Any, argument: int, shape: Sequence[int]) -> Term:
    return Term(None if argument == 0 else float(node._saved_alpha), shape)


def _product(node: Any, argument: int, shape: Sequence[int]) -> Term:
    return Term(_saved(node, "other") if argument == 0 else _saved(node, "self"), shape)


def _expanded(node: Any, argument: int, shape: Sequence[int]) -> Term:
    return Term(None, shape)


def _matrix_product(node: Any, argument: int, shape: Sequence[int]) -> RightFactor | None:
    return RightFactor(_saved(node, "self")) if argument == 1 else None


def _sum_with_matrix_product(node: Any, argument: int, shape: Sequence[int]) -> Term | RightFactor | None:
    if argument == 0:
        return Term(float(node._saved_beta), shape)
    return RightFactor(_saved(node, "mat1")) if argument == 2 and node._saved_alpha == 1 else None


def _known_map(node: Any, argument: int, shape: Sequence[int]) -> Term | RightFactor:
    return Term(None, shape) if argument == 2 else RightFactor(node.saved_tensors[0])


def _prelu(node: Any, argument: int, shape: Sequence[int]) -> Term | None:
    return Term(_saved(node, "self").clamp_max(0), shape) if argument == 1 else None


def _layer_norm(node: Any, argument: int, shape: Sequence[int]) -> Term | None:
    if argument == 2:
        return Term(None, shape)
    return (
        Term((_saved(node, "input") - _saved(node, "result1")) * _saved(node, "result2"), shape)
        if argument == 1
        else None
    )


def _batch_norm(node: Any, argument: int, shape: Sequence[int]) -> Term | None:
    if argument == 0 or node._saved_training:
        return None
    input, mean, variance = _saved(node, "input"), _saved(node, "running_mean"), _saved(node, "running_var")
    channels = (-1, *[1] * (input.dim() - 2))
    factor = (input - mean.view(channels)) * (variance.view(channels) + node._saved_eps).rsqrt()
    return Term(factor if argument == 1 else None, (*shape, *channels[1:]))


_READERS: dict[str, Reader] = {
    "AddBackward0": _sum,
    "SubBackward0": _sum,
    "MulBackward0": _product,
    "ExpandBackward0": _expanded,
    "MmBackward0": _matrix_product,
    "AddmmBackward0": _sum_with_matrix_product,
    "_FdcrKnownMapBackward": _known_map,
    "PreluKernelBackward0": _prelu,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeBatchNormBackward0": _batch_norm,
}


def _swapped_back(node: Any, x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.transpose(*(_signed(getattr(node, f"_saved_dim{i}", i)) for i in (0, 1))) if x.dim() > 1 else x


def _permuted_back(node: Any, x: Tensor, shape: Sequence[int]) -> Tensor:
    dims = [_signed(dim) % x.dim() for dim in node._saved_dims]
    return x.permute([dims.index(dim) for dim in range(x.dim())])


def _signed(dim: int) -> int:
    return dim - (1 << 64) if dim >= 1 << 63 else dim


def _reshaped_back(node: Any, x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(shape)


# What may be done to a parameter before: how its elements are brought back to the shape that they had.
_MOVES: dict[str, Callable[[Any, Tensor, Sequence[int]], Tensor]] = {
    "TBackward0": _swapped_back,
    "TransposeBackward0": _swapped_back,
    "PermuteBackward0": _permuted_back,
} | {
    f"{name}Backward{variant}": _reshaped_back
    for name in ("Alias", "Clone", "ReshapeAlias", "Squeeze", "ToCopy", "UnsafeView", "Unsqueeze", "View")
    for variant in range(4)
}


@dataclass(frozen=True)
class Entry:
    """A function, and which of its arguments are parameters.

    ``shape`` is that of the function's result. Behind an argument stands what was done to the parameter before, as
    functions with the shapes that they were given, and the argument's shape.
    """

    edge: GradientEdge
    shape: Sequence[int]
    params: Mapping[str, tuple[Term | RightFactor, Sequence[tuple[Node, Sequence[int]]], Sequence[int]]]

    def takes_samples_along(self, axis: Axis, n: int) -> bool:
        """Whether the gradients can be told apart for samples that lie so in the result."""
        return n == 1 or all(argument.takes_samples_along(axis) for argument, *_ in self.params.values())

    def has_rows(self, n: int) -> bool:
        """Whether the samples may be the rows of the result."""
        return len(self.shape) > 0 and self.shape[0] == n

    def sum_squares(self, grad: Tensor, axis: Axis, n: int) -> dict[str, Tensor]:
        """The sums of squares by name, given the gradient of the summed losses at the result."""
        squares = {}
        for name, (argument, moves, shape_of_argument) in self.params.items():
            x = argument.sum_squares(grad, axis, n).reshape(shape_of_argument)
            for node, shape in reversed(moves):
                x = _MOVES[node.name()](node, x, shape)
            squares[name] = x
        return squares


def entries(graph: Graph, leaves: Mapping[str, Tensor]) -> list[Entry]:
    """The functions by which those of the parameters ``leaves`` enter the graph for which that is simple."""
    found: dict[Node, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        source: Tensor | Node = leaf
        shape: Sequence[int] = leaf.shape
        moves: list[tuple[Node, Sequence[int]]] = []
        node = graph.only_use(leaf)
        while node is not None and node.name() in _MOVES:
            moves.append((node, shape))
            source, shape = node, _shape_of(node)
            node = graph.only_use(node)
        if node is None or node.name() not in _READERS:
            continue
        try:
            argument = _READERS[node.name()](node, _number_of_argument(node, source), shape)
        except RuntimeError:  # what the function read is no longer as it was
            continue
        if any(node._input_metadata[0].dtype.is_complex for node, _ in moves) or _is_odd(node, argument):
            continue
        if isinstance(argument, Term):
            missing = len(_shape_of(node)) - len(argument.shape)
            argument = Term(argument.factor, (*[1] * missing, *argument.shape))
        if argument is not None:
            found.setdefault(node, {})[name] = argument, moves, shape
    return [Entry(GradientEdge(node, 0), _shape_of(node), params) for node, params in found.items()]


def _is_odd(node: Any, argument: Term | RightFactor | None) -> bool:
    """Whether there are complex numbers, whose gradients are squared otherwise, or sparse factors."""
    factor = argument.left if isinstance(argument, RightFactor) else argument and argument.factor
    sparse = isinstance(factor, Tensor) and factor.layout != torch.strided
    return sparse or node._input_metadata[0].dtype.is_complex


def _shape_of(node: Node) -> torch.Size:
    shape: torch.Size = node._input_metadata[0].shape
    return shape


def _number_of_argument(node: Node, source: Tensor | Node) -> int:
    sources = [function for function, _ in node.next_functions]
    if isinstance(source, Tensor):
        sources = [getattr(function, "variable", None) for function in sources]
    return next(number for number, each in enumerate(sources) if each is source)
