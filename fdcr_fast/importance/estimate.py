"""The running sum of squared per-sample gradients: layer rules where they hold, ``vmap(grad)`` for the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from fdcr_fast.importance.capture import Call, Capture
from fdcr_fast.importance.data import arguments
from fdcr_fast.importance.graph import uses_in_graph, visit_gradients
from fdcr_fast.importance.kinds import Kind, Pass
from fdcr_fast.importance.losses import Loss, num_samples
from fdcr_fast.importance.per_sample import PerSampleGradients
from fdcr_fast.importance.rules import RULES

_log = logging.getLogger("fdcr_fast")

# Samples of one forward pass, where the caller leaves them open, for models of at most so many parameters. On a CPU
# few, so that activations stay in the caches, and in memory that the allocator keeps from batch to batch; more for
# small models, whose samples cost little next to what every batch costs.
_CPU_SAMPLES = {1 << 17: 128, 1 << 20: 64}
_CPU_SAMPLES_OF_LARGE_MODELS = 32
_GPU_SAMPLES = 256


@dataclass(frozen=True)
class _Forward:
    """What a forward pass leaves behind: the layers' calls, the passes back that are wanted, the first one's losses."""

    calls: dict[str, list[Call]]
    output: Any
    passes: list[Pass]
    losses: Tensor


class Estimate:
    """Mean over samples of squared gradients for the parameters ``names``.

    ``state`` holds the values of the model's parameters, and of those buffers that are not the model's own.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], names: Sequence[str], kind: Kind) -> None:
        self._model = model
        self._kind = kind
        # Detached views: the model's own parameters are neither asked for gradients nor changed.
        self._values = {name: x.detach() for name, x in state.items()}
        self._leaves = {name: self._values[name].detach().requires_grad_() for name in names}
        parts = list(self._leaves.values())
        double = any(p.dtype == torch.float64 for p in parts)
        self._vector = torch.zeros(
            sum(p.numel() for p in parts), dtype=torch.float64 if double else torch.float32, device=parts[0].device
        )
        views = self._vector.split([p.numel() for p in parts])
        self._sums = {name: v.view(p.shape) for (name, p), v in zip(self._leaves.items(), views, strict=True)}
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._fallback = PerSampleGradients(recurrent)
        self._not_sample_first: set[str] | None = None
        cpu = self._vector.device.type == "cpu"
        # How many samples the caller should add at a time.
        self.batch_size = _cpu_batch_size(sum(x.numel() for x in self._values.values())) if cpu else _GPU_SAMPLES
        # Pools and convolutions of several channels are faster so on CPUs.
        self._channels_last = cpu and any(type(m) is nn.Conv2d for m in model.modules())
        self.samples = 0
        self._weight = 0

    def add(self, inputs: Any, targets: Any) -> None:
        """Squared per-sample gradients of a batch: one forward pass, and one backward pass per pass of the kind."""
        if (n := num_samples(targets)) == 0:
            return
        inputs, targets = self._on_device(inputs, targets)
        forward = self._forward_captured(inputs, targets)
        losses: Tensor | None = forward.losses
        layers = self._layers(forward.calls, self._uses(forward.losses), inputs, n)
        covered = {param for name in layers for param in self._own(name)}
        rest = {name: p.detach() for name, p in self._leaves.items() if name not in covered}
        edges = {name: call.edge for name, call in layers.items() if call.edge is not None}
        forward.calls.clear()
        for i, each in enumerate(forward.passes, 1):
            last = i == len(forward.passes)
            losses = each.loss(forward.output, each.targets) if losses is None else losses
            visit_gradients(losses, edges, partial(self._add_layer, layers, each.share, last), keep_graph=not last)
            losses = None
            if rest:
                sample_loss = partial(self._sample_loss, each.loss)
                for name, squares in self._fallback.sum_squares(sample_loss, rest, inputs, each.targets).items():
                    self._sums[name].add_(squares, alpha=each.share)
        self.samples += n
        self._weight += n

    def add_batch_gradient(self, inputs: Any, targets: Any) -> None:
        """The squared gradient of the batch's mean loss, which is not a Fisher; every batch counts alike."""
        if (n := num_samples(targets)) == 0:
            return
        inputs, targets = self._on_device(inputs, targets)
        output = self._forward(self._leaves, inputs)
        (batch,) = self._kind(output, targets)
        losses = batch.loss(output, batch.targets)
        self._uses(losses)
        for total, g in zip(
            self._sums.values(), torch.autograd.grad(losses.mean(), list(self._leaves.values())), strict=True
        ):
            total += g.to_dense().to(total.dtype).square_()
        self.samples += n
        self._weight += 1

    def mean(self) -> Tensor:
        """The result, float32 or float64 ``[P]``; the sums are used up."""
        if self.samples == 0:
            raise ValueError("no samples: the mean over no data is undefined")
        return self._vector.div_(self._weight)

    def _on_device(self, inputs: Any, targets: Any) -> Any:
        device = self._vector.device
        return tree_map(lambda x: x.to(device), (inputs, targets))

    def _forward(self, params: Mapping[str, Tensor], inputs: Any) -> Any:
        args, kwargs = arguments(inputs)
        return functional_call(self._model, {**self._values, **params}, args, kwargs)

    def _forward_captured(self, inputs: Any, targets: Any) -> _Forward:
        if self._channels_last:
            try:
                return self._forward_as_given(tree_map(_channels_last, inputs), targets)
            except RuntimeError as error:  # such as a model's own view() of what is not contiguous
                _log.info("the model does not take images with channels last: %s", error)
                self._channels_last = False
        return self._forward_as_given(inputs, targets)

    def _forward_as_given(self, inputs: Any, targets: Any) -> _Forward:
        with Capture(self._model, inputs) as capture:
            output = self._forward(self._leaves, inputs)
        passes = list(self._kind(output, targets))
        return _Forward(capture.calls, output, passes, passes[0].loss(output, passes[0].targets))

    def _sample_loss(self, loss: Loss, params: Mapping[str, Tensor], inputs: Any, target: Any) -> Tensor:
        inputs, target = tree_map(lambda x: x.unsqueeze(0), (inputs, target))
        return loss(self._forward(params, inputs), target).squeeze(0)

    def _add_layer(self, layers: dict[str, Call], share: float, last: bool, name: str, grad: Tensor) -> None:
        """The last use of a layer's input lets go of it, so that memory shrinks while the backward pass runs."""
        call = layers.pop(name) if last else layers[name]
        squares = RULES[type(call.module)].sum_squares(call.module, call.input, grad)
        for param in self._own(name):
            self._sums[param].add_(squares[param.rpartition(".")[2]], alpha=share)

    def _uses(self, losses: Tensor) -> Mapping[str, int]:
        uses = uses_in_graph(losses, self._leaves)
        if unused := [name for name in self._leaves if not uses[name]]:
            raise ValueError(
                f"the losses do not depend on {', '.join(unused)}: their Fisher is unknown, not zero; "
                "use these parameters, or name the others with params="
            )
        return uses

    def _layers(
        self, calls: Mapping[str, Sequence[Call]], uses: Mapping[str, int], inputs: Any, n: int
    ) -> dict[str, Call]:
        """The layers whose rule gives the squared gradients of all parameters that they hold."""
        return {
            name: layer[0]
            for name, layer in calls.items()
            if len(layer) == 1
            and self._usable(layer[0], n, [uses[p] for p in self._own(name)])
            and self._sample_first(name, layer[0], inputs)
        }

    def _own(self, module_name: str) -> list[str]:
        """The wanted parameters that a layer holds itself."""
        prefix = f"{module_name}." if module_name else ""
        return [name for leaf in ("weight", "bias") if (name := prefix + leaf) in self._leaves]

    @staticmethod
    def _usable(call: Call, n: int, uses: list[int]) -> bool:
        """Whether the layer's call was the only use of its parameters, on an input as long as there are samples."""
        return (
            bool(uses)
            and all(count == 1 for count in uses)
            and call.intact
            and call.input.shape[:1] == call.output_shape[:1] == (n,)
        )

    def _sample_first(self, name: str, call: Call, inputs: Any) -> bool:
        """Whether dimension 0 holds the samples, and not something else that happens to be as long.

        Where the samples could be among the positions, or nowhere (a layer applied to a parameter), one forward pass
        with a single sample tells.
        """
        n = call.input.shape[0]
        positions = RULES[type(call.module)].positions(call.module, call.input.shape)
        if n == 1 or (call.of_data and positions.numel() % n != 0):
            return True
        if self._not_sample_first is None:
            inputs = tree_map(lambda x: x[:1], inputs)
            with Capture(self._model, inputs) as probe:
                self._forward(self._leaves, inputs)
            self._not_sample_first = {
                layer for layer, calls in probe.calls.items() if any(c.input.shape[:1] != (1,) for c in calls)
            }
        return name not in self._not_sample_first


def _cpu_batch_size(params: int) -> int:
    fitting = (samples for most, samples in _CPU_SAMPLES.items() if params <= most)
    return next(fitting, _CPU_SAMPLES_OF_LARGE_MODELS)


def _channels_last(x: Tensor) -> Tensor:
    images = x.dim() == 4 and x.is_floating_point()
    return x.contiguous(memory_format=torch.channels_last) if images else x
