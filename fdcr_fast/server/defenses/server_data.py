"""Rules for servers that have data of their own, or another way to judge a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdcr_fast.server.columns import client_params, dot_products
from fdcr_fast.server.defenses.comparison import of_all, valid_ids
from fdcr_fast.server.intake import ClientUpdates, sample_shares
from fdcr_fast.server.rules import AggregationRule, Selection
from fdcr_fast.server.shares import limited_shares
from fdcr_fast.server.vectors import shown


def _check_callable(rule: AggregationRule, name: str, result: str) -> None:
    function = getattr(rule, name)
    if not callable(function):
        raise TypeError(f"{name} must be a function from global parameters [P] to {result}, got {shown(function)}")


def _like(global_params: Tensor, value: Tensor, name: str) -> Tensor:
    """What a caller's function gave, if it fits the global parameters."""
    if not isinstance(value, Tensor) or value.shape != global_params.shape or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected {name} to return a floating-point tensor {list(global_params.shape)}, got {got}")
    if not value.isfinite().all():
        raise ValueError(f"what {name} returned is not finite")
    return value.detach().to(global_params.device)


@dataclass(frozen=True, kw_only=True)
class FLTrust(AggregationRule):
    """Trust by direction (Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS
    2021, Algorithm 2; ``alpha`` is 1 here).

    With the server's own update ``d``, ``T_k = max(0, cos(delta_k, d))`` and ``w' = w + sum_k T_k (||d|| / ||delta_k||)
    delta_k / sum_k T_k``; where no client is trusted, ``w' = w``. Sample counts do not matter. ``discrepancy`` holds
    ``1 - cos``.

    Args:
        server_update: From ``w [P]`` to ``d [P]``, what training on the server's data from ``w`` on changes.
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
        max_weight_share: Of ``T_k / sum T``, with which clients count after their updates were brought to one length.
    """

    weighs_samples = False
    server_update: Callable[[Tensor], Tensor]
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        _check_callable(self, "server_update", "the server's own update [P]")

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep whoever points into the server's half space."""
        own = _like(global_params, self.server_update(global_params), "server_update")
        size = torch.linalg.vector_norm(own, dtype=torch.float64).item()
        norms = clients.squared_norm[clients.valid].sqrt()
        lengths = norms * size
        cosine = torch.where(lengths > 0, dot_products(clients, own) / lengths, 0.0).clamp_(-1, 1)
        trust = cosine.clamp(min=0)
        shares = limited_shares(trust / trust.sum().clamp(min=1e-300), self.max_weight_share)
        weights = torch.where(shares > 0, shares * size / norms, 0.0)
        return Selection(of_all(clients, trust > 0), of_all(clients, 1 - cosine), weights=of_all(clients, weights))


@dataclass(frozen=True, kw_only=True)
class Finetuning(AggregationRule):
    """FedAvg, and then training on the server's own data: ``w'' = refine(w')``.

    The plain use of clean data against a backdoor, as in the fine-tuning baseline of Liu et al., "Fine-Pruning" (RAID
    2018), after every round. Where no client can be used nothing is refined.

    Args:
        refine: From global parameters ``[P]`` to better ones.
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
        max_weight_share: Likewise.
    """

    refine: Callable[[Tensor], Tensor]
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        _check_callable(self, "refine", "better ones [P]")

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The weighted mean, refined."""
        params = super().combine(global_params, clients, weights)
        return _like(params, self.refine(params), "refine").to(params.dtype)


class ModelQuality(NamedTuple):
    """How a model does on the server's data.

    Attributes:
        entropy: Mean entropy of the predicted distributions, in nats.
        loss: Mean loss.
    """

    entropy: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Sageflow(AggregationRule):
    """Entropy filter and loss weights (Park et al., "Sageflow: Robust Federated Learning against Both Stragglers and
    Adversaries", NeurIPS 2021), without its handling of stragglers.

    Clients whose model ``w + delta_k`` has a mean entropy above ``entropy_threshold`` on the server's data are dropped,
    and so are those whose entropy or loss is not finite; the others count as ``n_k / loss_k^loss_exponent``.
    ``discrepancy`` holds the entropies, ``explanation`` both figures by client.

    Args:
        evaluate: From the parameters ``[P]`` of one model to how it does.
        entropy_threshold: In nats. (The paper takes 1 against backdoors, 2.2 for others on Fashion-MNIST.)
        loss_exponent: ``delta`` of the paper; 0 weighs by sample count alone.
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
        max_weight_share: Likewise.
    """

    evaluate: Callable[[Tensor], ModelQuality]
    entropy_threshold: float = 1.0
    loss_exponent: float = 1.0
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        _check_callable(self, "evaluate", "a ModelQuality")
        if not self.entropy_threshold > 0:
            raise ValueError(f"entropy_threshold must be positive, got {self.entropy_threshold}")
        if not 0 <= self.loss_exponent < math.inf:
            raise ValueError(f"loss_exponent must be finite and not negative, got {self.loss_exponent}")

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
