"""The mean of every parameter, turned around where clients disagree on its sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import column_blocks
from fdcr_fast.rules.foreseen import MeanRule
from fdcr_fast.rules.server_options import ServerOptions


@dataclass(frozen=True, kw_only=True)
class RLR(MeanRule):
    """Robust learning rate (Ozdayi et al., "Defending against Backdoors in Federated Learning with Robust Learning
    Rate", AAAI 2021): the mean update, turned around where too few clients agree on its sign.

    ``w'[v] = w[v] +- sum_k alpha_k delta_k[v]``, plus where ``|sum_k sign(delta_k[v])| >= threshold``, else minus;
    ``alpha_k = n_k / sum n``, and the server's learning rate is 1.

    Args:
        threshold: Between the number of attackers and that of the other clients, both left out.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    sharded = True
    threshold: float
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> RLR:
        """The rule with a threshold that the assumed attackers cannot reach alone."""
        return cls(threshold=options.num_byzantine + 1)

    def of_mean(self, global_params: Tensor, clients: ClientUpdates, mean: Tensor) -> Tensor:
        """The mean, with the signs of the votes."""
        wide, limit = torch.promote_types(mean.dtype, torch.float32), torch.finfo(mean.dtype).max
        for columns, updates in column_blocks(clients):
            agreed = updates.sign().sum(0, dtype=torch.float32).abs_() >= self.threshold
            old, new = global_params[columns].to(wide), mean[columns].to(wide)
            turned = (old - new).add_(old).clamp_(-limit, limit)
            mean[columns] = torch.where(agreed, new, turned)
        return mean
