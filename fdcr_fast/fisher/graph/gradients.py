"""The backward pass: gradients at the edges of the graph, and what they show of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def visit_gradients(
    losses: Tensor,
    edges: Mapping[str, GradientEdge],
    lowest: Sequence[str],
    visit: Callable[[str, Tensor], None],
    *,
    keep_graph: bool,
) -> None:
    """Takes the gradients of the summed losses at the edges; each is visited and dropped as soon as it is complete.

    Only gradients at the ``lowest`` edges are asked for. No weight gradient is computed. An edge that no gradient
    reaches is not visited.
    """
    if not edges:
        return

    def visitor(name: str, output: int) -> Callable[..., None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if (grad := grads[output]) is not None:
                visit(name, grad)

        return hook

    handles: list[Any] = [
        edge.node.register_prehook(visitor(name, edge.output_nr)) for name, edge in edges.items() if name not in lowest
    ]
    try:
        ends = [edges[name] for name in lowest]
        grads = list(torch.autograd.grad(losses.sum(), ends, retain_graph=keep_graph, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(lowest):
        if (grad := grads.pop()) is not None:
            visit(name, grad)
        del grad


class RowsOfSamples:
    """A proof by gradients that each row, the entries at one place of dimension 0, is one sample's, in their order.

    The losses are weighted in backward passes of their own, by powers of two: a row of one sample alone is then that
    sample's weight times what it is for the sum of the losses, to the bit. The exponents of all samples differ in the
    first pass or, of more than ``_EXPONENTS`` samples, in another one: they are the digits of the sample's number.
    """

    def __init__(self, losses: Tensor, edges: Mapping[str, GradientEdge], lowest: Sequence[str]) -> None:
        self._weights: list[Tensor] = []
        self._weighted: dict[str, list[Tensor]] = {name: [] for name in edges}
        numbers = torch.arange(len(losses), device=losses.device)
        while not self._weights or bool((numbers > 0).any()):
            weights = torch.exp2((numbers % _EXPONENTS).double())
            self._weights.append(weights)
            visit_gradients(losses * weights.to(losses.dtype), edges, lowest, self._note, keep_graph=True)
            numbers = numbers // _EXPONENTS

    def _note(self, name: str, grad: Tensor) -> None:
        self._weighted[name].append(_projected_rows(grad))

    def are_in(self, name: str, grad: Tensor) -> bool:
        """Whether the rows of a gradient of the summed losses are those of the samples."""
        rows = _projected_rows(grad)
        # Numbers too small for all their digits may lose so much.
        lost = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps * grad[0].numel()
        found = self._weighted[name]
        return len(found) == len(self._weights) and all(
            bool(((weighted - rows * weights).abs() <= lost * weights).all())
            for weighted, weights in zip(found, self._weights, strict=True)
        )


# The largest weight leaves gradients far from the limits of float32 and bfloat16.
_EXPONENTS = 64


def _projected_rows(grad: Tensor) -> Tensor:
    """The product of every row with some vector, ``[N]`` in float64."""
    rows = grad.flatten(1).double()
    return rows @ torch.arange(1, rows.shape[1] + 1, device=grad.device).double().cos()
