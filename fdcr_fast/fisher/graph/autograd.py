"""The autograd graph of the losses: what enters it in which ways, and whose the entries on the way are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from fdcr_fast.fisher.graph.provenance import Axis, Flow, source_axis
from fdcr_fast.fisher.layers.recurrent import FUNCTIONS

_LEAF: type = torch._C._functions.AccumulateGrad


class Graph:
    """The graph of per-sample losses ``[N]``, walked once.

    Attributes:
        opaque: The functions in it that are written in Python, by others: their backward passes may go on where the
            graph does not (``torch.utils.checkpoint`` with ``use_reentrant=True``), so that parameters may be missing.
    """

    def __init__(self, losses: Tensor) -> None:
        self.opaque: set[type] = set()
        self._samples = len(losses)
        self._root_output = losses.output_nr
        self._following: dict[Node, Any] = {}
        self._order: list[Node] = []  # every node after all that were computed from it
        # What a node, or a tensor by its id, was used by; None where that are several uses.
        self._only_use: dict[Node | int, Node | None] = {}
        if losses.grad_fn is not None:
            self._walk(losses.grad_fn)

    def _walk(self, root: Node) -> None:
        waiting_for: Counter[Node] = Counter()
        self._following[root] = ()
        stack = [root]
        while stack:
            node = stack.pop()
            self._following[node] = following = node.next_functions
            for source, _ in following:
                if source is None:
                    continue
                used: Node | int = id(source.variable) if type(source) is _LEAF else source  # type: ignore[attr-defined]
                self._only_use[used] = None if used in self._only_use else node
                if used is source:
                    waiting_for[source] += 1
                    if source not in self._following:
                        self._following[source] = ()
                        stack.append(source)
            if isinstance(node, BackwardCFunction) and (function := type(node)._forward_cls) not in FUNCTIONS:
                self.opaque.add(function)
        ready = [root]
        while ready:
            node = ready.pop()
            self._order.append(node)
            for source, _ in self._following[node]:
                if source in self._following:
                    waiting_for[source] -= 1
                    if waiting_for[source] == 0:
                        ready.append(source)

    def uses(self, tensor: Tensor) -> bool:
        """Whether the losses depend on a tensor that requires gradients."""
        return id(tensor) in self._only_use

    def leaves_among(self, names: Mapping[int, str]) -> list[str]:
        """The names of those tensors that the losses depend on, given by their ids."""
        return [name for key, name in names.items() if key in self._only_use]

    def uses_only_through(self, tensor: Tensor, edge: GradientEdge) -> bool:
        """Whether all that the losses depend on of a tensor is what was computed from it on one way to an edge."""
        node = self.only_use(tensor)
        while node is not None and node is not edge.node:
            node = self.only_use(node)
        return node is not None

    def only_use(self, used: Tensor | Node) -> Node | None:
        """The function that alone takes a tensor that requires gradients, or the result of another function."""
        return self._only_use.get(id(used) if isinstance(used, Tensor) else used)

    def axes(self, edges: Mapping[str, GradientEdge]) -> dict[str, Axis]:
        """Where the samples lie in the tensors at these edges, for those of which the graph proves it."""
        wanted = {(edge.node, edge.output_nr): name for name, edge in edges.items()}
        arrived: dict[Node, dict[int, Axis | None]] = {node: {} for node in self._order}
        found: dict[str, Axis] = {}
        if self._order:
            arrived[self._order[0]] = {self._root_output: Axis(0)}
        for node in self._order:
            for output, axis in arrived.pop(node).items():
                if axis is not None and (node, output) in wanted:
                    found[wanted[node, output]] = axis
                result = node._input_metadata[output].shape
                for argument, (source, source_output) in enumerate(self._following[node]):
                    if source not in arrived:
                        continue
                    shape = source._input_metadata[source_output].shape
                    flow = Flow(node, argument, output, result, shape, self._samples)
                    reached = None if axis is None else source_axis(flow, axis)
                    known = arrived[source].setdefault(source_output, reached)
                    if known != reached:  # an entry of one sample here is one of another sample there
                        arrived[source][source_output] = None
        return found

    def lowest(self, edges: Mapping[str, GradientEdge]) -> list[str]:
        """The edges below which there is no other: a backward pass to them goes through all edges."""
        names = {edge.node: name for name, edge in edges.items()}
        leading_to_edges: set[Node] = set()
        lowest = []
        for node in reversed(self._order):
            above = any(source in leading_to_edges for source, _ in self._following[node])
            if node in names and not above:
                lowest.append(names[node])
            if node in names or above:
                leading_to_edges.add(node)
        return lowest
