"""Questions to the autograd graph of the losses, and its backward pass to the outputs of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def uses_in_graph(losses: Tensor, params: Mapping[str, Tensor]) -> Counter[str]:
    """How often each parameter enters the graph of the losses."""
    names = {id(param): name for name, param in params.items()}
    uses: Counter[str] = Counter()
    seen = set()
    stack = [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is None:
                stack.append(following)
            elif id(variable) in names:
                uses[names[id(variable)]] += 1
    return uses


def reaches(start: Node | None, goals: Collection[Node], barren: set[Node]) -> bool:
    """Whether the graph that leads to ``start`` contains one of the goals.

    ``barren`` holds nodes known to lead to no goal and grows by those found on the way.
    """
    seen = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in goals:
            return True
        if node is not None and node not in seen and node not in barren:
            seen.add(node)
            stack.extend(before for before, _ in node.next_functions)
    barren |= seen
    return False


def visit_gradients(
    losses: Tensor, edges: Mapping[str, GradientEdge], visit: Callable[[str, Tensor], None], *, keep_graph: bool
) -> None:
    """Gradients of the summed losses at the edges, each visited and dropped as soon as it is complete.

    Only gradients at the edges that no other edge comes before are asked for: on the way to them the pass goes
    through all the others. No weight gradient is computed.
    """
    if not edges:
        return
    nodes = {edge.node for edge in edges.values()}
    barren: set[Node] = set()
    first = [
        name
        for name, edge in edges.items()
        if not any(reaches(before, nodes, barren) for before, _ in edge.node.next_functions)
    ]

    def visitor(name: str, output: int) -> Callable[..., None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if (grad := grads[output]) is not None:
                visit(name, grad)

        return hook

    handles: list[Any] = [
        edge.node.register_prehook(visitor(name, edge.output_nr)) for name, edge in edges.items() if name not in first
    ]
    try:
        grads = list(torch.autograd.grad(losses.sum(), [edges[name] for name in first], retain_graph=keep_graph))
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(first):
        visit(name, grads.pop())
