"""Which labels the Fisher is taken over: those of the data, draws from the model, or the model's whole distribution.

Each kind turns one batch into passes, the sum of whose squared per-sample gradients is the batch's share of the Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.importance.losses import Loss, logits

BATCH_GRADIENT = "squared_batch_gradient"


@dataclass(frozen=True)
class Pass:
    """Squared per-sample gradients of ``loss(output, targets)`` are wanted, ``share`` times."""

    targets: Any
    loss: Loss
    share: float = 1.0


# (output, targets of the data) to the passes of a batch.
Kind = Callable[[Any, Any], Iterator[Pass]]


def _draw_class(output: Tensor, generator: torch.Generator | None) -> Tensor:
    probabilities = output.double().softmax(1).movedim(1, -1)
    draws = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return draws.view(probabilities.shape[:-1])


def _draw_bit(output: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.bernoulli(output.double().sigmoid(), generator=generator).to(output.dtype)


def _draw_normal(output: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
    return output + math.sqrt(0.5) * noise


# How the losses by name say that labels are distributed: (f - y)^2 is the normal distribution of variance 1/2, and
# log-probabilities are logits as well.
_DRAWS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "cross_entropy": _draw_class,
    "nll": _draw_class,
    "mse": _draw_normal,
    "bce_with_logits": _draw_bit,
}

# Variance of the loss's derivative by one output, where the labels of all outputs are independent.
_SCORE_VARIANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda output: torch.full_like(output, 2),
    "bce_with_logits": lambda output: output.sigmoid() * (1 - output.sigmoid()),
}


def resolve_kind(
    kind: str,
    name: str | Loss,
    loss: Loss,
    options: Mapping[str, Any],
    num_samples: int,
    generator: torch.Generator | None,
) -> Kind:
    """The function of a kind for the loss ``name``, whose per-sample function with ``options`` is ``loss``."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if kind != "sampled" and (num_samples != 1 or generator is not None):
        raise ValueError(f"num_samples and generator are for kind='sampled', got kind={kind!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    return KINDS[kind](name, loss, options, num_samples, generator)


def _empirical(name: str | Loss, loss: Loss, *_: Any) -> Kind:
    def passes(output: Any, targets: Any) -> Iterator[Pass]:
        yield Pass(targets, loss)

    return passes


def _sampled(
    name: str | Loss, loss: Loss, options: Mapping[str, Any], num_samples: int, generator: torch.Generator | None
) -> Kind:
    draw = _DRAWS[_distribution(name)]

    def passes(output: Any, targets: Any) -> Iterator[Pass]:
        for _ in range(num_samples):
            labels = draw(logits(output).detach(), generator)
            yield Pass(_ignored_as_in(targets, labels, options), loss, 1 / num_samples)

    return passes


def _exact(name: str | Loss, loss: Loss, options: Mapping[str, Any], *_: Any) -> Kind:
    if _distribution(name) not in _SCORE_VARIANCES:
        return partial(_every_class, loss, options)
    if options:
        raise ValueError(f"the exact Fisher of {name!r} has no loss options; use kind='sampled'")
    return partial(_every_output, _SCORE_VARIANCES[_distribution(name)])


def _every_class(loss: Loss, options: Mapping[str, Any], output: Any, targets: Any) -> Iterator[Pass]:
    """Every class weighted by its probability: ``E[g^2] = sum_c p_c g_c^2 = sum_c (sqrt(p_c) g_c)^2``."""
    scores = logits(output).detach()
    if scores.dim() != 2:
        raise ValueError(f"the exact Fisher takes outputs [N, C], got {list(scores.shape)}; use kind='sampled'")
    roots = scores.double().softmax(1).sqrt().to(scores.dtype)

    def weighted(output: Any, targets: Any) -> Tensor:
        label, root = targets
        losses: Tensor = loss(output, label) * root
        return losses

    for c in range(scores.shape[1]):
        labels = torch.full((len(scores),), c, device=scores.device)
        yield Pass((_ignored_as_in(targets, labels, options), roots[:, c]), weighted)


def _every_output(variance: Callable[[Tensor], Tensor], output: Any, targets: Any) -> Iterator[Pass]:
    """Independent labels of mean score 0: ``E[(sum_m s_m df_m)^2] = sum_m var(s_m) df_m^2``."""
    roots = _outputs(variance(logits(output).detach()).sqrt())

    def one(m: int, output: Any, root: Tensor) -> Tensor:
        return _outputs(logits(output))[:, m] * root

    for m in range(roots.shape[1]):
        yield Pass(roots[:, m], partial(one, m))


def _outputs(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1)


def _distribution(name: str | Loss) -> str:
    if not isinstance(name, str):
        raise ValueError("a callable loss does not say how labels are distributed: use kind='empirical'")
    return name


def _ignored_as_in(targets: Any, labels: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Positions that the data leave out, such as padding, stay out."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or labels.is_floating_point():
        return labels
    ignored = options.get("ignore_index", -100)
    return labels.masked_fill(targets == ignored, ignored)


KINDS: dict[str, Callable[..., Kind]] = {
    "empirical": _empirical,
    "sampled": _sampled,
    "exact": _exact,
    BATCH_GRADIENT: _empirical,
}
