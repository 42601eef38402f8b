"""Weights by the losses of the clients' models on the server's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import client_params
from fdcr_fast.round.shares import limited_shares, sample_shares
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.server_data.callables import check_callable
from fdcr_fast.rules.server_options import ModelQuality, ServerOptions
from fdcr_fast.rules.valid_clients import of_all, valid_ids


@dataclass(frozen=True, kw_only=True)
class Sageflow(AggregationRule):
    """Entropy filter and loss weights (Park et al., "Sageflow: Robust Federated Learning against Both Stragglers and
    Adversaries", NeurIPS 2021), without its handling of stragglers.

    Clients whose model ``w + delta_k`` has a mean entropy above ``entropy_threshold`` on the server's data are dropped,
    and so are those whose entropy or loss is not finite; the others count as ``n_k / loss_k^loss_exponent``.
    ``discrepancy`` holds the entropies, ``explanation`` both figures by client.

    Args:
        evaluate: Function from the parameters ``[P]`` of one model to how it does.
        entropy_threshold: Largest mean entropy, in nats. (The paper takes 1 against backdoors, 2.2 for others on
            Fashion-MNIST.)
        loss_exponent: ``delta`` of the paper; 0 weighs by sample count alone.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    needs_server_data = True
    evaluate: Callable[[Tensor], ModelQuality]
    entropy_threshold: float = 1.0
    loss_exponent: float = 1.0
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        check_callable(self, "evaluate", "a ModelQuality")
        if not self.entropy_threshold > 0:
            raise ValueError(f"entropy_threshold must be positive, got {self.entropy_threshold}")
        if not 0 <= self.loss_exponent < math.inf:
            raise ValueError(f"loss_exponent must be finite and not negative, got {self.loss_exponent}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> Sageflow:
        """The rule that judges models by the server's data."""
        return cls(evaluate=options.needed_data().evaluate)

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep models that are sure of what they say."""
        quality = [ModelQuality(*self.evaluate(params)) for params in client_params(global_params, clients)]
        entropy, loss = torch.tensor(quality, dtype=torch.float64).unbind(1)
        kept = of_all(clients, (entropy <= self.entropy_threshold) & loss.isfinite())
        reward = of_all(clients, loss.clamp(min=1e-12).pow(-self.loss_exponent).nan_to_num(0.0))
        shares = sample_shares(clients.num_samples, kept) * reward
        return Selection(
            kept,
            of_all(clients, entropy),
            weights=limited_shares(shares / shares.sum().clamp(min=1e-300), self.max_weight_share),
            explanation=dict(zip(valid_ids(clients), quality, strict=True)),
        )
