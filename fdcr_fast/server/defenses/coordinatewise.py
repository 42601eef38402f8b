"""Robust statistics of every parameter by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.server import passes
from fdcr_fast.server.columns import column_blocks
from fdcr_fast.server.defenses.byzantine import ByzantineRule
from fdcr_fast.server.defenses.comparison import equal_weights
from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationRule, Selection


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(AggregationRule):
    """The median of every parameter, ``w'[v] = w[v] + median_k delta_k[v]`` (Yin et al., ICML 2018, Definition 1).

    Of an even number of clients the mean of the middle two. All clients count alike, whatever their sample counts.

    Args:
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
    """

    weighs_samples = False
    sharded = True
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        self._check_options()

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """The same for all clients; what counts in one parameter need not count in another."""
        return equal_weights(kept)

    def buffer_trim(self, kept: int) -> int | None:
        """All but the middle one or two."""
        return (kept - 1) // 2

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The median over all clients of weight not 0."""
        read = weights != 0
        return passes.central_mean(global_params, clients, read, 2 - int(read.sum()) % 2, nearest=False)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(ByzantineRule):
    """The mean of every parameter without its ``f`` smallest and ``f`` largest values (Yin et al., ICML 2018,
    Definition 2, with ``f = beta K``).

    All clients count alike, whatever their sample counts. It needs ``K >= 2 f + 1`` clients.
    """

    sharded = True

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep everybody, if there are enough of them."""
        self.tolerated(clients)
        return Selection(clients.valid, weights=equal_weights(clients.valid))

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The trimmed mean over all clients of weight not 0."""
        read = weights != 0
        keep = int(read.sum()) - 2 * self.tolerated(clients)
        return passes.central_mean(global_params, clients, read, keep, nearest=False)


@dataclass(frozen=True, kw_only=True)
class RLR(AggregationRule):
    """Robust learning rate (Ozdayi et al., "Defending against Backdoors in Federated Learning with Robust Learning
    Rate", AAAI 2021): the mean update, turned around where too few clients agree on its sign.

    ``w'[v] = w[v] +- sum_k alpha_k delta_k[v]``, plus where ``|sum_k sign(delta_k[v])| >= threshold``, else minus;
    ``alpha_k = n_k / sum n``, and the server's learning rate is 1.

    Args:
        threshold: Between the number of attackers and that of the other clients, both left out.
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
        max_weight_share: Likewise.
    """

    sharded = True
    threshold: float
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The weighted mean, with the signs of the votes."""
        params = super().combine(global_params, clients, weights)
        limit = torch.finfo(params.dtype).max
        for columns, updates in column_blocks(clients):
            agreed = updates.sign().sum(0, dtype=torch.float32).abs() >= self.threshold
            old, new = global_params[columns].double(), params[columns].double()
            params[columns] = torch.where(agreed, new, (2 * old - new).clamp(-limit, limit)).to(params.dtype)
        return params
