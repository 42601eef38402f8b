"""The labels that a Fisher is taken over: those of the data, draws from the model, or the model's whole distribution.

Each kind turns one batch into passes, whose squared per-sample gradients add up to what the batch adds to the Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.fisher.losses import CategoricalLoss, ElementwiseLoss, Loss, logits

BATCH_GRADIENT = "squared_batch_gradient"


@dataclass(frozen=True)
class Pass:
    """One backward pass: the squared per-sample gradients of ``loss(output, targets)`` are wanted, ``weight`` times."""

    targets: Any
    loss: Loss
    weight: float = 1.0


# (output, targets of the data) to the passes of a batch.
Kind = Callable[[Any, Any], Iterator[Pass]]


def resolve_kind(kind: str, loss: Loss, num_samples: int, generator: torch.Generator | None) -> Kind:
    """The function of a kind for a loss."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if kind != "sampled" and (num_samples != 1 or generator is not None):
        raise ValueError(f"num_samples and generator are for kind='sampled', got kind={kind!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    return KINDS[kind](loss, num_samples, generator)


def _empirical(loss: Loss, *_: Any) -> Kind:
    def passes(output: Any, targets: Any) -> Iterator[Pass]:
        yield Pass(targets, loss)

    return passes


def _sampled(loss: Loss, num_samples: int, generator: torch.Generator | None) -> Kind:
    named = _distribution(loss)

    def passes(output: Any, targets: Any) -> Iterator[Pass]:
        for _ in range(num_samples):
            yield Pass(named.draw(output, targets, generator), named.of_labels, 1 / num_samples)

    return passes


def _exact(loss: Loss, *_: Any) -> Kind:
    named = _distribution(loss)
    if isinstance(named, CategoricalLoss):
        return partial(_every_class, named)
    if named.has_options:
        raise ValueError("the exact Fisher of losses of single outputs has no loss options; use kind='sampled'")
    return partial(_every_output, named)


def _every_class(loss: CategoricalLoss, output: Any, targets: Any) -> Iterator[Pass]:
    """A pass for every class, weighted by its probability: ``E[g^2] = sum_c p_c g_c^2 = sum_c (sqrt(p_c) g_c)^2``."""

    def weighted(output: Any, targets: Any) -> Tensor:
        labels, root = targets
        losses: Tensor = loss.of_labels(output, labels) * root
        return losses

    for labels, probability in loss.each_class(output, targets):
        yield Pass((labels, probability.sqrt().to(logits(output).dtype)), weighted)


def _every_output(loss: ElementwiseLoss, output: Any, targets: Any) -> Iterator[Pass]:
    """A pass for every output, as labels are independent with scores of mean 0.

    ``E[(sum_m s_m df_m)^2] = sum_m var(s_m) df_m^2``.
    """
    roots = _outputs(loss.score_variance(logits(output).detach()).sqrt())

    def one(m: int, output: Any, root: Tensor) -> Tensor:
        return _outputs(logits(output))[:, m] * root

    for m in range(roots.shape[1]):
        yield Pass(roots[:, m], partial(one, m))


def _outputs(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1)


def _distribution(loss: Loss) -> CategoricalLoss | ElementwiseLoss:
    if not isinstance(loss, CategoricalLoss | ElementwiseLoss):
        raise ValueError("a callable loss does not say how labels are distributed: use kind='empirical'")
    return loss


KINDS: dict[str, Callable[..., Kind]] = {
    "empirical": _empirical,
    "sampled": _sampled,
    "exact": _exact,
    BATCH_GRADIENT: _empirical,
}
