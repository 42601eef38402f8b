"""The diagonal empirical Fisher information of a model on data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from fdcr_fast.importance.capture import Call, Capture, uses_in_graph
from fdcr_fast.importance.losses import Loss, num_samples, resolve_loss
from fdcr_fast.importance.per_sample import PerSampleGradients
from fdcr_fast.importance.rules import RULES

_log = logging.getLogger("fdcr_fast")

# Samples of one forward pass where the caller leaves them open. On a CPU few enough that the layers' inputs and outputs
# (float32 numbers, about a third of what a batch keeps alive) stay in memory that the allocator uses again, but never
# so few that what every batch costs counts.
_MOST_SAMPLES = 256
_CPU_SAMPLES = 32
_CPU_ACTIVATIONS = 6 << 20


def diagonal_fisher(
    model: nn.Module,
    data: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    loss: str | Loss = "cross_entropy",
    *,
    params: Iterable[str] | None = None,
    batch_size: int | None = None,
    eval_mode: bool = True,
) -> Tensor:
    r"""Diagonal empirical Fisher information (paper eq. 5), squared per sample before the mean.

    .. math:: F = \frac{1}{N} \sum_{n=1}^N \left( \nabla_w \, \ell(f_w(x_n), y_n) \right)^2

    with :math:`\ell = -\log p(y | x)` for the default loss. Linear, convolution, embedding and norm layers go through
    the library's own kernels, which need no memory for per-sample gradients; all other parameters, and layers that
    are called several times, share weights or do not keep the samples in dimension 0, through ``vmap(grad)`` in
    chunks. Both are exact. Neither ``.grad`` nor ``requires_grad`` is read or written, and parameters that are frozen
    for training have a Fisher like all others: choose with ``params``.

    Args:
        model: Any module that treats the samples of a batch independently of each other.
        data: ``(inputs, targets)``, or an iterable of such batches (a ``DataLoader``). ``inputs`` is a tensor, a tuple
            of positional arguments or a mapping of keyword arguments; all tensors have the samples in dimension 0.
        loss: ``cross_entropy``, ``nll``, ``mse``, ``bce_with_logits`` (summed over whatever an output has besides its
            sample dimension), or a callable ``(output, targets) -> [N]`` of per-sample losses.
        params: Names of the parameters wanted, by default all of ``model.named_parameters()``.
        batch_size: Samples of one forward pass; larger batches are cut. By default what suits the device.
        eval_mode: Evaluate the model in eval mode and restore its modes afterwards, also after an error. With False
            the modules keep their modes, and dropout draws its masks from the global generator.

    Returns:
        ``[P]``, the chosen parameters flattened one after the other in the order of ``named_parameters()``, on the
        model's device; float32, or float64 for a float64 model.

    Raises:
        ValueError: No samples; unknown loss or parameter; a parameter that the losses do not depend on; layers that
            couple the samples of a batch (batch normalisation with batch statistics).
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: its graphs have no place for hooks
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    with torch.inference_mode(False), torch.enable_grad(), _modes(model, eval_mode):
        _refuse_batch_statistics(model)
        estimate = _Estimate(model, _select(model, params), resolve_loss(loss))
        for inputs, targets in _batches(data, lambda: batch_size or estimate.batch_size()):
            estimate.add(inputs, targets)
    return estimate.mean()


class _Estimate:
    """Running sum of squared per-sample gradients."""

    def __init__(self, model: nn.Module, names: Sequence[str], loss: Loss) -> None:
        self._model = model
        self._loss = loss
        # Detached views: the model's own parameters are neither asked for gradients nor changed.
        self._values = {name: p.detach() for name, p in model.named_parameters()}
        self._leaves = {name: self._values[name].detach().requires_grad_() for name in names}
        parts = list(self._leaves.values())
        double = any(p.dtype == torch.float64 for p in parts)
        self._vector = torch.zeros(
            sum(p.numel() for p in parts), dtype=torch.float64 if double else torch.float32, device=parts[0].device
        )
        views = self._vector.split([p.numel() for p in parts])
        self._sums = {name: v.view(p.shape) for (name, p), v in zip(self._leaves.items(), views, strict=True)}
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._fallback = PerSampleGradients(self._sample_loss, randomness="different", recurrent=recurrent)
        self._not_sample_first: set[str] | None = None
        # Pools and convolutions of several channels are faster so on CPUs.
        self._channels_last = self._vector.device.type == "cpu" and any(type(m) is nn.Conv2d for m in model.modules())
        self._activations = 0.0  # of one sample
        self._n = 0

    def add(self, inputs: Any, targets: Any) -> None:
        n = num_samples(targets)
        if n == 0:
            return
        device = self._vector.device
        inputs, targets = tree_map(lambda x: x.to(device), (inputs, targets))
        layers = self._layers(inputs, targets)
        rest = {name: p.detach() for name, p in self._leaves.items()}
        for name, call, g in layers:
            squares = RULES[type(call.module)].sum_squares(call.module, call.input, g)
            for param in self._own(name):
                self._sums[param] += squares[param.rpartition(".")[2]]
                del rest[param]
        if rest:
            for param, square in self._fallback.sum_squares(rest, inputs, targets).items():
                self._sums[param] += square
        self._n += n

    def batch_size(self) -> int:
        """How many samples the next forward pass should have at most, as far as is known by now."""
        if self._vector.device.type != "cpu":
            return _MOST_SAMPLES
        if self._n == 0:
            return _CPU_SAMPLES
        return max(_CPU_SAMPLES, min(_MOST_SAMPLES, int(_CPU_ACTIVATIONS / max(1, self._activations))))

    def mean(self) -> Tensor:
        if self._n == 0:
            raise ValueError("no samples: the mean over no data is undefined")
        return self._vector.div_(self._n)

    def _layers(self, inputs: Any, targets: Any) -> list[tuple[str, Call, Tensor]]:
        """The layers whose rule may be used: names, calls, and gradients at their outputs."""
        if self._channels_last:
            try:
                return self._backpropagate(tree_map(_channels_last, inputs), targets)
            except RuntimeError as error:  # such as a model's own view() of what is not contiguous
                _log.info("the model does not take images with channels last: %s", error)
                self._channels_last = False
        return self._backpropagate(inputs, targets)

    def _backpropagate(self, inputs: Any, targets: Any) -> list[tuple[str, Call, Tensor]]:
        n = num_samples(targets)
        with Capture(self._model, inputs) as capture:
            losses = self._losses(self._leaves, inputs, targets)
        self._activations = (
            sum(c.input.numel() + c.output_shape.numel() for cs in capture.calls.values() for c in cs) / n
        )
        uses = uses_in_graph(losses, self._leaves)
        if unused := [name for name in self._leaves if not uses[name]]:
            raise ValueError(
                f"the losses do not depend on {', '.join(unused)}: their Fisher is unknown, not zero; "
                "use these parameters, or name the others with params="
            )
        layers = {
            name: calls[0]
            for name, calls in capture.calls.items()
            if len(calls) == 1
            and self._usable(calls[0], n, [uses[p] for p in self._own(name)])
            and self._sample_first(name, calls[0], inputs, targets)
        }
        grads = _gradients(losses, list(layers.values()))
        return [(name, call, g) for (name, call), g in zip(layers.items(), grads, strict=True)]

    def _losses(self, params: Mapping[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        args, kwargs = _arguments(inputs)
        output = functional_call(self._model, {**self._values, **params}, args, kwargs)
        return self._loss(output, targets)

    def _sample_loss(self, params: Mapping[str, Tensor], inputs: Any, target: Any) -> Tensor:
        inputs, target = tree_map(lambda x: x.unsqueeze(0), (inputs, target))
        return self._losses(params, inputs, target).squeeze(0)

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

    def _sample_first(self, name: str, call: Call, inputs: Any, targets: Any) -> bool:
        """Whether dimension 0 holds the samples, and not something else that happens to be as long.

        Where the samples could be among the positions, or nowhere (a layer applied to a parameter), one forward pass
        with a single sample tells.
        """
        n = call.input.shape[0]
        positions = RULES[type(call.module)].positions(call.module, call.input.shape)
        if n == 1 or (call.of_data and positions.numel() % n != 0):
            return True
        if self._not_sample_first is None:
            inputs, targets = tree_map(lambda x: x[:1], (inputs, targets))
            with Capture(self._model, inputs) as probe:
                self._losses(self._leaves, inputs, targets)
            self._not_sample_first = {
                layer for layer, calls in probe.calls.items() if any(c.input.shape[:1] != (1,) for c in calls)
            }
        return name not in self._not_sample_first


def _gradients(losses: Tensor, calls: Sequence[Call]) -> Sequence[Tensor]:
    """Gradients of the summed losses at the outputs of the layers; no weight gradient is computed."""
    if not calls:
        return []
    edges = [call.edge for call in calls if call.edge is not None]
    return torch.autograd.grad(losses.sum(), edges)


def _select(model: nn.Module, params: Iterable[str] | None) -> list[str]:
    known = [name for name, _ in model.named_parameters()]
    wanted = set(known if params is None else [params] if isinstance(params, str) else params)
    if unknown := wanted - set(known):
        raise ValueError(f"the model has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if not wanted:
        raise ValueError("no parameters: the model has none, or params= names none")
    return [name for name in known if name in wanted]


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _channels_last(x: Tensor) -> Tensor:
    images = x.dim() == 4 and x.is_floating_point()
    return x.contiguous(memory_format=torch.channels_last) if images else x


def _batches(data: Any, batch_size: Callable[[], int]) -> Iterator[tuple[Any, Any]]:
    one_batch = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)
    for batch in [data] if one_batch else data:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(f"expected batches (inputs, targets), got {got}")
        start, n = 0, num_samples(batch[1])
        while start < n:
            parts = -(-(n - start) // batch_size())
            samples = slice(start, start + -(-(n - start) // parts))  # parts as equal as possible
            yield tuple(tree_map(lambda x, s=samples: x[s], tuple(batch)))
            start = samples.stop


@contextmanager
def _modes(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name} normalises with the statistics of the batch, so no sample has a gradient of its own: "
                "use running statistics in eval mode, or a normalisation within the sample (GroupNorm)"
            )
