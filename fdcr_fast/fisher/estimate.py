"""The running sum of squared per-sample gradients: layer rules where they hold, ``vmap(grad)`` for the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdcr_fast.fisher.data import Batch
from fdcr_fast.fisher.graph.autograd import Graph
from fdcr_fast.fisher.graph.capture import Call, Capture
from fdcr_fast.fisher.graph.entries import Entry, entries
from fdcr_fast.fisher.graph.gradients import RowsOfSamples, visit_gradients
from fdcr_fast.fisher.graph.provenance import Axis
from fdcr_fast.fisher.kinds import Kind, Pass
from fdcr_fast.fisher.layers.recurrent import Unrolled
from fdcr_fast.fisher.losses import losses_of
from fdcr_fast.fisher.model.hooks import noticed
from fdcr_fast.fisher.model.stateless import Stateless
from fdcr_fast.fisher.per_sample import PerSampleGradients, hides_parameters, plain_gradients

_log = logging.getLogger("fdcr_fast")

# Samples of one forward pass, where the caller leaves them open, for models of at most so many parameters. On a CPU
# few, so that activations stay in the caches, and in memory that the allocator keeps from batch to batch; more for
# small models, whose samples cost little next to what every batch costs.
_CPU_SAMPLES = {1 << 17: 128, 1 << 20: 64}
_CPU_SAMPLES_OF_LARGE_MODELS = 32
_GPU_SAMPLES = 256


@dataclass(frozen=True)
class _Forward:
    """The result of a forward pass: the layers' calls, the passes back that are wanted, and the losses of the first."""

    calls: dict[str, list[Call | None]]
    output: Any
    passes: list[Pass]
    losses: Tensor


_Source = Call | Entry


@dataclass(frozen=True)
class _Part:
    """A source of the squared gradients of some parameters: the call of a layer, or an entry.

    Attributes:
        params: Names of the parameters that are wanted, by those that the source has for them.
        axis: The place of the samples at its edge.
        samples: The number of them.
        proven: Whether the graph tells the place; else the gradients that arrive must show it.
    """

    source: _Source
    params: Mapping[str, str]
    axis: Axis
    samples: int
    proven: bool

    def sum_squares(self, grad: Tensor) -> dict[str, Tensor]:
        """Squares by the names of the parameters, given the gradient of the summed losses at the source's edge.

        Raises:
            ValueError: The rule of a layer lacks one of its parameters.
        """
        if grad.numel() == 0:
            return {}
        squares = self.source.sum_squares(grad, self.axis, self.samples)
        try:
            return {param: squares[name] for name, param in self.params.items()}
        except KeyError as missing:
            assert isinstance(self.source, Call), "an entry has all of its parameters"
            layer, given = type(self.source.module).__name__, ", ".join(squares) or "nothing"
            raise ValueError(f"the rule of {layer} gives {given}, and no {missing.args[0]}") from None


class _NotTakenError(Exception):
    """The model does not take what should make its forward pass fast."""


class Estimate:
    """The mean over samples of the squared gradients of the parameters ``names``.

    ``fallback`` is for what no layer rule can do. With ``only``, the samples of that slice alone count in a batch, and
    the first pass of the kind.
    """

    def __init__(
        self,
        model: Stateless,
        names: Sequence[str],
        kind: Kind,
        fallback: PerSampleGradients,
        only: slice | None = None,
    ) -> None:
        self._model = model
        self._only = only
        self._kind = kind
        self._fallback = fallback
        self._wanted = list(names)
        self._leaves: dict[str, Tensor] = {}  # what stands for these parameters, in every forward pass another one
        self._names: dict[int, str] = {}
        parts = [model.params[name] for name in names]
        double = any(p.dtype == torch.float64 for p in parts)
        self._vector = torch.zeros(
            sum(p.numel() for p in parts), dtype=torch.float64 if double else torch.float32, device=parts[0].device
        )
        views = self._vector.split([p.numel() for p in parts])
        # The sums of squares by name, views of the vector.
        self.sums = {name: v.view(p.shape) for name, p, v in zip(names, parts, views, strict=True)}
        self._reached: set[str] = set()  # parameters that some losses depend on
        self._mixed: set[str] = set()  # parts that were once seen to have no row for every sample
        self._alone = False  # whether every sample goes through plain autograd on its own
        self._warned = False
        self._tried: set[type] = set()  # functions that may hide ways to parameters, and have shown whether they do
        # With some parameters only, parts of the model may be missing in graphs because their inputs have no gradients.
        self._partly = len(names) < sum(p.is_floating_point() for p in model.params.values())
        cpu = self._vector.device.type == "cpu"
        # How many samples the caller should add at a time.
        self.batch_size = _cpu_batch_size(sum(x.numel() for x in model.params.values())) if cpu else _GPU_SAMPLES
        # Pools and convolutions of several channels are faster so on CPUs.
        self._channels_last = cpu and any(type(m) is nn.Conv2d for m in model.module.modules())
        self._unrolled = Unrolled(model.module.modules())
        self.samples = 0
        self._weight = 0
        if model.hooked:  # which may do anything to gradients, also by what those of other samples are
            self.one_by_one()

    def add(self, batch: Batch) -> None:
        """Adds a batch's squared per-sample gradients, by one forward pass and a backward pass per pass of the kind."""
        if batch.samples == 0:
            return
        if self.samples and not self._warned and (unreached := self._unreached()):
            # No error yet: other samples may take another way through the model.
            _log.warning("the losses of the first %d samples do not depend on %s", self.samples, ", ".join(unreached))
            self._warned = True
        batch = batch.to(self._vector.device)
        rest = self._add_somehow(batch)
        if rest is None:
            if hides_parameters(self._model, self._first_losses, batch):
                self.one_by_one()
            rest = self._add_somehow(batch, tried=True)
            assert rest is not None
        for each, uncovered in rest:
            names = [name for name in self._wanted if name in uncovered]
            samples = batch.with_targets(each.targets)
            if self._only is not None:
                samples = samples.part(self._only)
            squares = self._fallback.sum_squares(each.loss, names, samples) if names else {}
            for name, s in squares.items():
                self.sums[name].add_(s, alpha=each.weight)
            self._reached.update(squares)
        self.samples += batch.samples
        self._weight += batch.samples

    def _add_somehow(self, batch: Batch, tried: bool = False) -> list[tuple[Pass, set[str]]] | None:
        """Calls :meth:`_add_by_graph`, again and without what makes it fast where the model does not take that."""
        try:
            return self._add_by_graph(batch, tried)
        except _NotTakenError as error:
            _log.info("a forward pass is run again, as the model is: %s", error.__cause__)
            return self._add_somehow(batch, tried)

    def _add_by_graph(self, batch: Batch, tried: bool = False) -> list[tuple[Pass, set[str]]] | None:
        """Adds what layers and entries give, and returns what every pass lacks after that.

        None, and nothing is added, if the graph may hide ways to parameters: that should be tried.
        """
        self._leaves = self._model.leaves(self._wanted)
        self._names = {id(leaf): name for name, leaf in self._leaves.items()}
        with self._model.at(self._leaves) as call, self._unrolled:
            with noticed() as hooks:  # which may look at what belongs to several samples
                forward = self._forward_captured(call, batch)
            apart = not self._model.joins_samples()
            graph = Graph(forward.losses)
            if referred := graph.leaves_among(self._model.originals):
                raise ValueError(
                    f"the forward pass uses {', '.join(referred)} by a reference outside of the modules (in a list, a "
                    "closure): it does not see the values that the Fisher is taken at; refer to it by its module"
                )
            uses = {name for name, leaf in self._leaves.items() if graph.uses(leaf)}
            if hooks:
                self.one_by_one()
            missing = len(uses) < len(self._leaves)
            if self._alone:
                apart, uses = False, set(self._leaves)
            elif not tried and (not graph.opaque <= self._tried or (missing and (bool(graph.opaque) or self._partly))):
                self._tried |= graph.opaque
                return None
            else:
                self._reached |= uses
            parts = self._parts(forward.calls, graph, batch.samples) if apart else {}
            forward.calls.clear()
            return [(each, uses - covered) for each, covered in self._add_parts(forward, graph, parts)]

    def _first_losses(self, output: Any, targets: Any) -> Tensor:
        first = next(iter(self._kind(output, targets)))
        return losses_of(first.loss, output, first.targets)

    def add_batch_gradient(self, batch: Batch, weight: int) -> None:
        """Adds the squared gradient of the batch's mean loss, which is not a Fisher, ``weight`` times."""
        if batch.samples == 0:
            return

        def part_of_mean(output: Any, targets: Any) -> Tensor:
            (each,) = self._kind(output, targets)
            return losses_of(each.loss, output, each.targets) / batch.samples

        grads = plain_gradients(self._model, part_of_mean, self._wanted, batch.to(self._vector.device))
        for name, g in grads.items():
            self.sums[name] += weight * g.to(self._vector.dtype).square()
        self._reached.update(grads)
        self.samples += batch.samples
        self._weight += weight

    def one_by_one(self) -> None:
        """Sends every sample through plain autograd on its own from now on."""
        self._alone = True
        self._fallback.one_by_one()

    def mean(self) -> Tensor:
        """The result, float32 or float64 ``[P]``; the sums are used up.

        Raises:
            ValueError: No samples, or a parameter that no losses depend on.
        """
        if self.samples == 0:
            raise ValueError("no samples: the mean over no data is undefined")
        if unreached := self._unreached():
            raise ValueError(
                f"the losses do not depend on {', '.join(unreached)}: their Fisher is unknown, not zero; "
                "use these parameters, or name the others with params="
            )
        return self._vector.div_(self._weight)

    def _unreached(self) -> list[str]:
        return [name for name in self._wanted if name not in self._reached and self.sums[name].numel()]

    def _forward_captured(self, call: Callable[[Any], Any], batch: Batch) -> _Forward:
        try:
            return self._forward_as_given(call, batch.private(channels_last=self._channels_last))
        except RuntimeError as error:
            if self._channels_last:  # a model's own view() of what is not contiguous
                self._channels_last = False
            elif self._unrolled.wanted:  # a second derivative in the forward pass
                self._unrolled.wanted = False
            else:
                raise
            raise _NotTakenError from error

    def _forward_as_given(self, call: Callable[[Any], Any], batch: Batch) -> _Forward:
        inputs, targets = batch.tree()
        with Capture(self._model.module) as capture:
            output = call(inputs)
        passes = list(self._kind(output, targets))
        if self._only is not None:
            passes = [Pass(passes[0].targets, passes[0].loss)]
        return _Forward(capture.calls, output, passes, self._losses(passes[0], output))

    def _losses(self, each: Pass, output: Any) -> Tensor:
        losses = losses_of(each.loss, output, each.targets)
        if self._only is None:
            return losses
        alone = torch.zeros_like(losses)
        alone[self._only] = 1
        return losses * alone

    def _parts(self, calls: Mapping[str, Sequence[Call | None]], graph: Graph, n: int) -> dict[str, _Part]:
        """The sources that need no gradients of single samples, by unique names: layers, and entries for the rest.

        The layers are those that are called once, on samples apart, with the only uses of their parameters.
        """
        layers: dict[str, tuple[_Source, dict[str, str]]] = {}
        for name, (call, *more) in calls.items():
            if call is None or more or not call.intact:
                continue
            params = {own: self._names[id(p)] for own, p in call.params.items() if id(p) in self._names}
            if all(graph.uses_only_through(self._leaves[param], call.edge) for param in params.values()):
                layers[name] = call, params
        parts = self._arranged(layers, graph, n)
        covered = {param for part in parts.values() for param in part.params.values()}
        others = {name: x for name, x in self._leaves.items() if name not in covered and graph.uses(x)}
        found = {next(iter(entry.params)): entry for entry in entries(graph, others)}
        named: dict[str, tuple[_Source, dict[str, str]]] = {
            name: (entry, {param: param for param in entry.params}) for name, entry in found.items()
        }
        return parts | self._arranged(named, graph, n)

    def _arranged(
        self,
        sources: Mapping[str, tuple[_Source, dict[str, str]]],
        graph: Graph,
        n: int,
    ) -> dict[str, _Part]:
        """The sources of which it is clear where the samples lie, or will be by their gradients."""
        edges = {name: source.edge for name, (source, params) in sources.items() if params and name not in self._mixed}
        axes = graph.axes(edges) if n > 1 and edges else dict.fromkeys(edges, Axis(0))
        parts = {}
        for name in edges:
            source, params = sources[name]
            axis, proven = axes.get(name, Axis(0)), name in axes
            if source.takes_samples_along(axis, n) and (proven or source.has_rows(n)):
                parts[name] = _Part(source, params, axis, n, proven)
        return parts

    def _add_parts(self, forward: _Forward, graph: Graph, parts: dict[str, _Part]) -> Iterator[tuple[Pass, set[str]]]:
        """Adds what the parts give; yields every pass with the parameters that it was given for."""
        params = {name: part.params.values() for name, part in parts.items()}
        edges = {name: part.source.edge for name, part in parts.items()}
        unproven = {name: edges[name] for name, part in parts.items() if not part.proven}
        lowest, lowest_unproven = graph.lowest(edges), graph.lowest(unproven)
        losses: Tensor | None = forward.losses
        for i, each in enumerate(forward.passes, 1):
            last = i == len(forward.passes)
            losses = self._losses(each, forward.output) if losses is None else losses
            # For every pass: in one of them all gradients of a layer may be zero, which shows nothing.
            rows = RowsOfSamples(losses, unproven, lowest_unproven) if unproven else None
            added: list[str] = []
            visit = partial(self._add_part, parts, rows, each.weight, last, added)
            visit_gradients(losses, edges, lowest, visit, keep_graph=not last)
            losses = None
            yield each, {param for name in added for param in params[name]}

    def _add_part(
        self,
        parts: dict[str, _Part],
        rows: RowsOfSamples | None,
        weight: float,
        last: bool,
        added: list[str],
        name: str,
        grad: Tensor,
    ) -> None:
        """Adds what one part gives, for its gradient.

        The last use of a layer's input lets go of it, so that memory shrinks while the backward pass runs.
        """
        part = parts.pop(name) if last else parts[name]
        if rows is not None and not part.proven and not rows.are_in(name, grad):
            self._mixed.add(name)
        if name in self._mixed:
            return
        for param, squares in part.sum_squares(grad).items():
            self.sums[param].add_(squares, alpha=weight)
        added.append(name)


def _cpu_batch_size(params: int) -> int:
    fitting = (samples for most, samples in _CPU_SAMPLES.items() if params <= most)
    return next(fitting, _CPU_SAMPLES_OF_LARGE_MODELS)
