"""Clients whose directions align unusually well or unusually badly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import Columns, column_sums, squared_length, whole_updates
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import equal_weights, of_all, valid_ids

_SAME = 1e-12  # a deviation of cosines or shares that is rounding
_ROUNDING = 1e-9  # of two clients both are one deviation away from their median


@dataclass(frozen=True)
class Alignment:
    """How the update of one client is aligned, of which neither too much nor too little is usual.

    Attributes:
        direction: The cosine of the update and the global parameters.
        signs: The share of its largest coordinates that have the principal sign.
    """

    direction: float
    signs: float


@dataclass(frozen=True, kw_only=True)
class AlignIns(AggregationRule):
    """Direction alignment inspection (Xu et al., "Detecting Backdoor Attacks in Federated Learning via Direction
    Alignment Inspection", CVPR 2025).

    ``omega_k = cos(delta_k, w)`` is the temporal direction alignment; the masked principal sign alignment ``rho_k`` is
    the share of the ``top_share P`` coordinates of ``delta_k`` with the largest absolute values (rounded down, but at
    least one) whose sign is the principal one, ``sign sum_j sign delta_j``. Of equal values at the edge all count, with
    the same fraction each. Clients are kept whose ``omega`` and ``rho`` both lie within ``direction_radius`` and
    ``sign_radius`` population standard deviations of the median; where all are alike, all are kept, and where nobody is
    left, ``w' = w``. The updates of the kept are clipped to the median of their norms and averaged, all alike whatever
    their sample counts. ``scores`` hold the larger of the two distances over its radius, above 1 for those dropped;
    ``explanation`` holds an :class:`Alignment` for each client.

    Args:
        top_share: Part of the coordinates that counts.
        direction_radius: ``lambda_c``, of the cosines.
        sign_radius: ``lambda_s``, of the signs.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
    """

    weighs_samples = False
    top_share: float = 0.3
    direction_radius: float = 1.0
    sign_radius: float = 1.0
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not 0 < self.top_share <= 1:
            raise ValueError(f"top_share must be in (0, 1], got {self.top_share}")
        for name in ("direction_radius", "sign_radius"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @property
    def needs_norms(self) -> bool:
        """True: cosines take norms, and updates are clipped."""
        return True

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep those whose direction and signs are both usual."""
        direction, signs = _alignments(global_params, clients, self.top_share)
        scores = torch.maximum(_deviations(direction) / self.direction_radius, _deviations(signs) / self.sign_radius)
        kept = of_all(clients, scores <= 1 + _ROUNDING)
        norms = clients.squared_norm.sqrt()
        median = norms[kept].quantile(0.5) if kept.any() else 0.0
        clip = torch.where(norms > 0, median / norms, 1.0).clamp(max=1)
        pairs = zip(direction.tolist(), signs.tolist(), strict=True)
        return Selection(
            kept,
            of_all(clients, scores),
            weights=equal_weights(kept) * clip,
            explanation=dict(zip(valid_ids(clients), (Alignment(*pair) for pair in pairs), strict=True)),
        )


def _deviations(values: Tensor) -> Tensor:
    """How many standard deviations values lie from their median; 0 where they are all alike."""
    deviation = values.std(correction=0)
    apart = (values - values.quantile(0.5)).abs()
    return apart / deviation if deviation > _SAME else torch.zeros_like(apart)


def _alignments(global_params: Tensor, clients: ClientUpdates, top_share: float) -> tuple[Tensor, Tensor]:
    """Temporal direction alignment and masked principal sign alignment of the valid clients, float64 ``[n]`` each."""
    count = max(1, int(top_share * clients.num_params + 1e-9))
    least = least_of_largest(clients, count)[:, None]

    def terms(columns: Columns) -> Tensor:
        updates = columns.updates
        principal = updates.sign().sum(0).sign()
        aligned = updates.sign() == principal
        size = updates.abs()
        above, edge = size > least, size == least
        masks = torch.stack([above & aligned, edge & aligned, above, edge])
        along = updates @ global_params[columns.params].double()
        # A product with ones is a sum of them, in a fifth of the time.
        return torch.cat([along[None], masks.double() @ updates.new_ones(updates.shape[1])])

    along, aligned_above, aligned_edge, above, edge = column_sums(clients, terms, 5).cpu()
    lengths = squared_length(global_params).sqrt().cpu() * clients.of_valid(clients.squared_norm).sqrt()
    direction = torch.where(lengths > 0, along / lengths, 0.0).clamp_(-1, 1)
    return direction, (aligned_above + aligned_edge * (count - above) / edge) / count


def least_of_largest(clients: ClientUpdates, count: int) -> Tensor:
    """The least of the ``count`` largest absolute values of every valid client's update, float64 ``[n]``."""
    dtype = torch.float64 if torch.float64 in clients.tiles.dtypes else torch.float32
    # Only one value of each row counts: which of several equal ones it is does not matter.
    values = [rows.abs_().kthvalue(clients.num_params - count + 1).values for rows in whole_updates(clients, dtype)]
    return torch.cat(values).double()
