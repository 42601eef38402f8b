"""Per-sample losses by name: negative log-likelihoods, summed over whatever a sample has besides dimension 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

Loss = Callable[[Any, Any], Tensor]


def _per_sample(loss: Callable[..., Tensor]) -> Loss:
    def losses(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target, reduction="none").unsqueeze(-1).flatten(1).sum(1)

    return losses


LOSSES: dict[str, Loss] = {
    "cross_entropy": _per_sample(F.cross_entropy),
    "nll": _per_sample(F.nll_loss),
    "mse": _per_sample(F.mse_loss),
    "bce_with_logits": _per_sample(F.binary_cross_entropy_with_logits),
}


def num_samples(targets: Any) -> int:
    """Length of the first dimension of the targets."""
    return len(tree_leaves(targets)[0])


def resolve_loss(loss: str | Loss) -> Loss:
    """The function of that name, or the function itself, checked to return one loss per sample."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: expected one of {', '.join(LOSSES)} or a callable")
        loss = LOSSES[loss]
    function = loss

    def checked(output: Any, target: Any) -> Tensor:
        losses = function(output, target)
        n = num_samples(target)
        if not isinstance(losses, Tensor) or losses.shape != (n,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"the loss must return one value per sample, [{n}], got {got}; use reduction='none'")
        return losses

    return checked
