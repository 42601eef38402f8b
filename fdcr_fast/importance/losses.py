"""Per-sample losses by name: negative log-likelihoods, summed over whatever a sample has besides dimension 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

# (output of the model, targets), both with the samples in dimension 0, to the losses of the samples [N].
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class NamedLoss:
    """A loss of ``torch.nn.functional`` and the names of those of its options that make sense per sample."""

    function: Callable[..., Tensor]
    options: frozenset[str] = frozenset()

    def per_sample(self, options: Mapping[str, Any]) -> Loss:
        """The loss with these options; tensors among them follow the output's dtype and device."""

        def losses(output: Any, target: Tensor) -> Tensor:
            output = logits(output)
            given = {name: x.to(output) if isinstance(x, Tensor) else x for name, x in options.items()}
            each = self.function(output, target, reduction="none", **given)
            return each.unsqueeze(-1).flatten(1).sum(1)

        return losses


LOSSES: dict[str, NamedLoss] = {
    "cross_entropy": NamedLoss(F.cross_entropy, frozenset({"weight", "label_smoothing", "ignore_index"})),
    "nll": NamedLoss(F.nll_loss, frozenset({"weight", "ignore_index"})),
    "mse": NamedLoss(F.mse_loss),
    "bce_with_logits": NamedLoss(F.binary_cross_entropy_with_logits, frozenset({"weight", "pos_weight"})),
}


def logits(output: Any) -> Tensor:
    """What a named loss is taken of: the output itself, or its ``logits`` as Hugging Face models have them."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"a loss by name takes a model whose output is a tensor or has logits, got {type(output).__name__}; "
            "pass a callable (output, targets) -> [N] instead"
        )
    return output


def num_samples(targets: Any) -> int:
    """Length of the first dimension of the targets."""
    return len(tree_leaves(targets)[0])


def resolve_loss(loss: str | Loss, options: Mapping[str, Any]) -> Loss:
    """The function of that name with these options, or the function itself, checked to return one loss per sample."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: expected one of {', '.join(LOSSES)} or a callable")
        known = LOSSES[loss].options
        if unknown := set(options) - known:
            raise ValueError(
                f"the loss {loss!r} has no option {', '.join(sorted(unknown))}; "
                f"it has {', '.join(sorted(known)) or 'none'}"
            )
        loss = LOSSES[loss].per_sample(options)
    elif options:
        raise ValueError("loss_options are for losses by name: a callable has its own")
    function = loss

    def checked(output: Any, target: Any) -> Tensor:
        losses = function(output, target)
        n = num_samples(target)
        if not isinstance(losses, Tensor) or losses.shape != (n,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"the loss must return one value per sample, [{n}], got {got}; use reduction='none'")
        return losses

    return checked
