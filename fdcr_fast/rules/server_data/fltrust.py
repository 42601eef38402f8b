"""Weights by direction, compared with the server's own update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import dot_products, squared_length
from fdcr_fast.round.shares import limited_shares
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.server_data.callables import check_callable, checked_vector
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.valid_clients import of_all


@dataclass(frozen=True, kw_only=True)
class FLTrust(AggregationRule):
    """Trust by direction (Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS
    2021, Algorithm 2; ``alpha`` is 1 here).

    With the server's own update ``d``, ``T_k = max(0, cos(delta_k, d))`` and ``w' = w + sum_k T_k (||d|| / ||delta_k||)
    delta_k / sum_k T_k``; where no client is trusted, ``w' = w``. Sample counts do not matter. ``discrepancy`` holds
    ``1 - cos``.

    Args:
        server_update: Function from ``w [P]``, a copy, to ``d [P]``, what training on the server's data from ``w`` on
            changes.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest ``T_k / sum T``, with which clients count after their updates were brought to one
            length; by default there is no limit.
    """

    weighs_samples = False
    needs_server_data = True
    server_update: Callable[[Tensor], Tensor]
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        check_callable(self, "server_update", "the server's own update [P]")

    @classmethod
    def from_options(cls, options: ServerOptions) -> FLTrust:
        """The rule that compares with training on the server's data."""
        return cls(server_update=options.needed_data().update)

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep whoever points into the server's half space."""
        own = checked_vector(global_params, self.server_update(global_params.clone()), "server_update")
        size = math.sqrt(squared_length(own).item())
        norms = clients.of_valid(clients.squared_norm).sqrt()
        lengths = norms * size
        cosine = torch.where(lengths > 0, dot_products(clients, own) / lengths, 0.0).clamp_(-1, 1)
        trust = cosine.clamp(min=0)
        shares = limited_shares(trust / trust.sum().clamp(min=1e-300), self.max_weight_share)
        weights = torch.where(shares > 0, shares * size / norms, 0.0)
        return Selection(of_all(clients, trust > 0), of_all(clients, 1 - cosine), weights=of_all(clients, weights))
