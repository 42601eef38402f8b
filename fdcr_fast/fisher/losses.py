"""Losses with a value per sample: negative log-likelihoods by name, or whatever function is given.

A sample's loss is the sum, or the mean, over whatever its output has besides classes: tokens, pixels, coordinates.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fdcr_fast.warning import callers_level

# (output of the model, targets), both with the samples in dimension 0, to the losses of the samples [N].
Loss = Callable[[Any, Any], Tensor]


class CategoricalLoss:
    """``-log p`` of classes, of which every sample may have several: one per token or pixel.

    Args:
        function: ``cross_entropy`` of ``torch.nn.functional``, or ``nll_loss``, of probabilities, too.
        class_dim: The dimension of the outputs that holds the classes. By default the one that the targets lack: 1 as
            PyTorch has it, or the last as models of language have it.
        per_sample: ``"sum"`` or ``"mean"`` over the targets of a sample that are not ignored.
        shift: Outputs at position t are about the target at position t + shift: 1 for models that predict the next
            token and are trained on ``labels = input_ids``.
        ignore_index: Targets without a loss.
        options: Others of ``torch.nn.functional``'s function.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        class_dim: int | None = None,
        per_sample: str = "sum",
        shift: int = 0,
        ignore_index: int = -100,
        **options: Any,
    ) -> None:
        self._function = function
        self._class_dim = class_dim
        self._mean = _is_mean(per_sample)
        self._shift = shift
        self._ignored = ignore_index
        self._options = options

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """The losses ``[N]`` of the targets of the data."""
        return self._losses(*self._arranged(output, targets))

    def of_labels(self, output: Any, labels: Any) -> Tensor:
        """The losses ``[N]`` of labels from :meth:`draw` or :meth:`each_class`."""
        targets, drawn = labels
        scores, _, dim = self._arranged(output, targets)
        return self._losses(scores, drawn, dim)

    def draw(self, output: Any, targets: Any, generator: torch.Generator | None) -> Any:
        """Labels drawn from the model's distribution; targets that are ignored stay so."""
        scores, labels, dim = self._arranged(output, targets)
        probabilities = scores.detach().double().softmax(dim).movedim(dim, -1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])
        return targets, self._ignored_as_in(labels, drawn)

    def each_class(self, output: Any, targets: Any) -> Iterator[tuple[Any, Tensor]]:
        """Every class as the labels of all samples, and its probabilities ``[N]`` in float64."""
        scores, given, _ = self._arranged(output, targets)
        if scores.dim() != 2:
            raise ValueError(f"the exact Fisher takes outputs [N, C], got {list(scores.shape)}; use kind='sampled'")
        probabilities = scores.detach().double().softmax(1)
        for c in range(scores.shape[1]):
            labels = torch.full((len(scores),), c, device=scores.device)
            yield (targets, self._ignored_as_in(given, labels)), probabilities[:, c]

    def _arranged(self, output: Any, targets: Any) -> tuple[Tensor, Tensor, int]:
        """Scores, the classes or probabilities that they are about, and the scores' dimension of classes."""
        scores, targets = logits(output), _one_tensor(targets)
        soft = targets.is_floating_point()
        if not soft and targets.dim() == scores.dim() and targets.shape[-1] == 1:
            targets = targets.squeeze(-1)  # a column of labels
        dim = self._dim_of_classes(scores, targets)
        if dim not in (1, scores.dim() - 1):
            scores, targets = scores.movedim(dim, -1), targets.movedim(dim, -1) if soft else targets
            dim = scores.dim() - 1
        if self._shift:
            if scores.dim() != 3:
                raise ValueError(f"shift takes outputs with one dimension of positions, got {list(scores.shape)}")
            count = targets.shape[1] - self._shift
            scores = scores.narrow(3 - dim, 0, count)
            targets = targets.narrow(3 - dim if soft else 1, self._shift, count)
        return scores, targets if soft else targets.long(), dim

    def _dim_of_classes(self, scores: Tensor, targets: Tensor) -> int:
        shape, soft = list(scores.shape), targets.is_floating_point()
        dims = sorted({1, max(1, len(shape) - 1)}) if self._class_dim is None else [self._class_dim % len(shape)]
        expected = {dim: shape if soft else shape[:dim] + shape[dim + 1 :] for dim in dims if 0 < dim < len(shape)}
        fitting = [dim for dim, wanted in expected.items() if wanted == list(targets.shape)]
        if not fitting:
            raise ValueError(
                f"outputs {shape}, with classes in dimension {' or '.join(map(str, dims))}, need class indices "
                f"{' or '.join(str(shape[:dim] + shape[dim + 1 :]) for dim in dims)} of an integer dtype, or "
                f"probabilities {shape}; got targets {list(targets.shape)} of {targets.dtype}"
            )
        if len(fitting) == 1:
            return fitting[0]
        chosen = fitting[-1] if len(shape) == 3 else 1  # tokens, or pixels
        warnings.warn(
            f"outputs {shape} and targets {list(targets.shape)} do not tell which dimension holds the classes, taken "
            f"to be {chosen}: say so with loss_options={{'class_dim': {chosen}}}",
            stacklevel=callers_level(),
        )
        return chosen

    def _losses(self, scores: Tensor, targets: Tensor, dim: int) -> Tensor:
        given = {name: x.to(scores) if isinstance(x, Tensor) else x for name, x in self._options.items()}
        function = partial(self._function, reduction="none", ignore_index=self._ignored, **given)
        if scores.dim() == 2:
            return function(scores, targets)
        if dim == 1:
            each = function(scores, targets)
        else:
            each = function(scores.flatten(0, -2), targets.flatten(0, scores.dim() - 2)).view(scores.shape[:-1])
        if not self._mean:
            return each.flatten(1).sum(1)
        if targets.is_floating_point():
            return each.flatten(1).mean(1)
        return each.flatten(1).sum(1) / (targets != self._ignored).flatten(1).sum(1).clamp_min(1)

    def _ignored_as_in(self, targets: Tensor, labels: Tensor) -> Tensor:
        """The labels without those at positions that the data leave out, such as padding."""
        return labels if targets.is_floating_point() else labels.masked_fill(targets == self._ignored, self._ignored)


def _nll_loss(
    scores: Tensor, targets: Tensor, *, weight: Tensor | None = None, reduction: str, ignore_index: int
) -> Tensor:
    """The negative log-likelihood of class indices or probabilities; PyTorch's takes indices only."""
    if not targets.is_floating_point():
        return F.nll_loss(scores, targets, weight=weight, reduction=reduction, ignore_index=ignore_index)
    weights = 1 if weight is None else weight.view(-1, *[1] * (scores.dim() - 2))
    return -(targets * scores * weights).sum(1)


class ElementwiseLoss(ABC):
    """A loss of every output by itself."""

    def __init__(self, function: Callable[..., Tensor], *, per_sample: str = "sum", **options: Any) -> None:
        self._function = function
        self._mean = _is_mean(per_sample)
        self._options = options
        self.has_options = bool(options) or self._mean

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """The losses ``[N]`` of labels of the outputs' shape."""
        output = logits(output)
        given = {name: x.to(output) if isinstance(x, Tensor) else x for name, x in self._options.items()}
        each = self._function(output, _shaped_as(output, _one_tensor(targets)), reduction="none", **given)
        each = each.unsqueeze(-1).flatten(1)
        return each.mean(1) if self._mean else each.sum(1)

    of_labels = __call__

    @abstractmethod
    def draw(self, output: Any, targets: Any, generator: torch.Generator | None) -> Tensor:
        """Labels drawn from the model's distribution, for :meth:`of_labels`."""

    @abstractmethod
    def score_variance(self, output: Tensor) -> Tensor:
        """Variance of the loss's derivative by each output."""


class SquaredError(ElementwiseLoss):
    """``(f - y)^2``: labels of the normal distribution of variance 1/2 around the outputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(F.mse_loss, **options)

    def draw(self, output: Any, targets: Any, generator: torch.Generator | None) -> Tensor:
        """See :class:`ElementwiseLoss`."""
        mean = logits(output).detach()
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + math.sqrt(0.5) * noise

    def score_variance(self, output: Tensor) -> Tensor:
        """See :class:`ElementwiseLoss`."""
        return torch.full_like(output, 2)


class BinaryCrossEntropy(ElementwiseLoss):
    """``-log p`` of independent bits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(F.binary_cross_entropy_with_logits, **options)

    def draw(self, output: Any, targets: Any, generator: torch.Generator | None) -> Tensor:
        """See :class:`ElementwiseLoss`."""
        scores = logits(output).detach()
        return torch.bernoulli(scores.double().sigmoid(), generator=generator).to(scores.dtype)

    def score_variance(self, output: Tensor) -> Tensor:
        """See :class:`ElementwiseLoss`."""
        return output.sigmoid() * (1 - output.sigmoid())


@dataclass(frozen=True)
class NamedLoss:
    """A loss by name: how it is made, and the names of the options that it takes."""

    make: Callable[..., CategoricalLoss | ElementwiseLoss]
    options: frozenset[str]


_OF_CLASSES = frozenset({"weight", "ignore_index", "class_dim", "per_sample", "shift"})

LOSSES: dict[str, NamedLoss] = {
    "cross_entropy": NamedLoss(partial(CategoricalLoss, F.cross_entropy), _OF_CLASSES | {"label_smoothing"}),
    "nll": NamedLoss(partial(CategoricalLoss, _nll_loss), _OF_CLASSES),
    "mse": NamedLoss(SquaredError, frozenset({"per_sample"})),
    "bce_with_logits": NamedLoss(BinaryCrossEntropy, frozenset({"weight", "pos_weight", "per_sample"})),
}


def logits(output: Any) -> Tensor:
    """The tensor that a loss by name is taken of: the output, or its ``logits`` as Hugging Face models have them."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"a loss by name takes a model whose output is a tensor or has logits, got {type(output).__name__}; "
            "pass a callable (output, targets) -> [N] instead"
        )
    return output


def _one_tensor(targets: Any) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ValueError(f"a loss by name takes targets that are one tensor, got {type(targets).__name__}")
    return targets


def _shaped_as(output: Tensor, targets: Tensor) -> Tensor:
    """The targets in the outputs' shape, of which dimensions of size 1 may be missing, or too many."""
    if targets.shape != output.shape:
        shapes = [[len(x), *(size for size in x.shape[1:] if size != 1)] for x in (output, targets)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"outputs {list(output.shape)} need targets of that shape, got {list(targets.shape)}")
        targets = targets.reshape(output.shape)
    return targets if targets.is_floating_point() else targets.to(output.dtype)


def _is_mean(per_sample: str) -> bool:
    if per_sample not in ("sum", "mean"):
        raise ValueError(f"per_sample must be 'sum' or 'mean', got {per_sample!r}")
    return per_sample == "mean"


def resolve_loss(loss: str | Loss, options: Mapping[str, Any]) -> Loss:
    """The loss of that name with these options, or the function itself."""
    if not isinstance(loss, str):
        if not callable(loss):
            raise ValueError(
                f"loss must be a name or a callable, got {type(loss).__name__}; data is one argument: (inputs, targets)"
            )
        if options:
            raise ValueError("loss_options are for losses by name: a callable has its own")
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: expected one of {', '.join(LOSSES)} or a callable")
    known = LOSSES[loss].options
    if unknown := set(options) - known:
        raise ValueError(
            f"the loss {loss!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    return LOSSES[loss].make(**options)


def losses_of(loss: Loss, output: Any, targets: Any) -> Tensor:
    """The losses of the samples, checked to be one for each, by targets of their own, which a loss may write to."""
    losses = loss(output, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, targets))
    n = next(len(x) for x in tree_leaves(targets) if isinstance(x, Tensor) and x.dim() > 0)
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"the loss must return one value per sample, [{n}], got {got}; use reduction='none'")
    if losses.is_complex():
        raise ValueError(f"losses must be real numbers, got {losses.dtype}")
    return losses
