"""How attackers train: what deviates from the plain SGD of benign clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast.sim.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Constrain(Objective):
    """Constrain-and-scale of Bagdasaryan et al. 2020 before scaling: ``alpha L_class + (1 - alpha) L_ano``.

    Attributes:
        alpha: 1 is plain training.
        anomaly: ``L_ano`` of the parameters.
    """

    alpha: float
    anomaly: Callable[[Tensor], Tensor]

    def loss(self, class_loss: Tensor, params: Tensor) -> Tensor:
        """The weighted sum."""
        return self.alpha * class_loss + (1 - self.alpha) * self.anomaly(params)


@dataclass(frozen=True, eq=False)
class ProjectOntoBall(Objective):
    """PGD of Wang et al. 2020 (arXiv:2007.05084): stay in a ball around the global model.

    Attributes:
        centre: The global parameters.
        radius: In L2 norm.
    """

    centre: Tensor
    radius: float

    def project(self, params: Tensor) -> Tensor:
        """The nearest point of the ball."""
        update = params.double() - self.centre
        norm = float(update.norm())
        if norm <= self.radius:
            return params
        return (self.centre + update * (self.radius / norm)).to(params.dtype)


@dataclass(frozen=True, eq=False)
class Freeze(Objective):
    """Neurotoxin (Zhang et al. 2022, arXiv:2206.10341): leave the coordinates alone that others will overwrite.

    Gradient and weight decay of these coordinates are thereby projected away. (The published code masks the
    gradient, not the weight decay.)

    Attributes:
        values: Parameters to return to, those of the global model.
        frozen: Which coordinates, bool ``[P]``.
    """

    values: Tensor
    frozen: Tensor

    def project(self, params: Tensor) -> Tensor:
        """The parameters with the frozen ones put back."""
        return torch.where(self.frozen, self.values, params)


@dataclass(frozen=True, eq=False)
class TrainingKnowledge:
    """What an attacker's training may depend on.

    Attributes:
        params: Global parameters as sent out, ``[P]``.
        last_update: What the last round changed in them, ``[P]``; None in the first round.
        alpha: Weight of the class loss of ``constrain``.
        share: Share of coordinates that ``neurotoxin`` freezes.
        norm: Radius of ``pgd``; called by it alone, as it may have to be measured.
    """

    params: Tensor
    last_update: Tensor | None
    alpha: float
    share: float
    norm: Callable[[], float]


def plain(_: TrainingKnowledge) -> Objective | None:
    """Plain training, as benign clients do."""
    return None


def constrain_l2(known: TrainingKnowledge) -> Objective:
    """Constrain-and-scale's loss with ``L_ano = ||w - w_global||_2``."""
    return Constrain(known.alpha, lambda params: torch.linalg.vector_norm(params - known.params))


def constrain_cosine(known: TrainingKnowledge) -> Objective:
    """Constrain-and-scale's loss with ``L_ano = 1 - cos(w, w_global)``."""
    return Constrain(known.alpha, lambda params: 1 - F.cosine_similarity(params, known.params, dim=0))


def pgd(known: TrainingKnowledge) -> Objective:
    """Projection onto a ball around the global model after every step."""
    return ProjectOntoBall(known.params, known.norm())


def neurotoxin(known: TrainingKnowledge) -> Objective | None:
    """Freeze the ``round(share * P)`` coordinates that the last round changed most; none in the first round."""
    if known.last_update is None:
        return None
    frozen = torch.zeros_like(known.params, dtype=torch.bool)
    frozen[known.last_update.abs().topk(round(known.share * len(frozen))).indices] = True
    return Freeze(known.params, frozen)


ATTACKER_TRAININGS: dict[str, Callable[[TrainingKnowledge], Objective | None]] = {
    "plain": plain,
    "constrain-l2": constrain_l2,
    "constrain-cosine": constrain_cosine,
    "pgd": pgd,
    "neurotoxin": neurotoxin,
}
