"""Three distances at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import column_sums, dot_products, squared_length
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import chosen, of_all


@dataclass(frozen=True, kw_only=True)
class MultiMetrics(AggregationRule):
    """Multi-metrics (Huang et al., "Multi-metrics adaptively identifies backdoors in Federated learning", ICCV 2023).

    ``x_k = (||delta_k||_1, ||delta_k||_2, cos(w, w + delta_k))`` compares a client's model with the global one in three
    ways; ``x'_k`` is the sum of ``|x_k - x_j|`` over the other clients, of each. With the covariance ``C`` of the
    ``x'_k`` the score is ``sqrt(x'_k^T C^-1 x'_k)``, and the ``keep_share`` of the clients with the smallest scores is
    averaged by sample count. Where ``C`` has no inverse (as with fewer than 4 clients) its pseudo-inverse takes its
    place, after the metrics are divided by their deviations. ``discrepancy`` holds the scores. (The authors' code sums
    the first and last metric over pairs of clients instead; this is the paper's text.)

    Args:
        keep_share: Part of the clients that is kept, rounded down, but at least one of them.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    sharded = True
    keep_share: float = 0.3
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share must be in (0, 1], got {self.keep_share}")

    @property
    def needs_norms(self) -> bool:
        """True: norms are one of the metrics."""
        return True

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep those with the smallest scores, of equal ones the first."""
        scores = whitened_scores(_metrics(global_params, clients))
        count = max(1, int(self.keep_share * len(scores) + 1e-9))
        return Selection(chosen(clients, scores.argsort(stable=True)[:count]), of_all(clients, scores))


def _metrics(global_params: Tensor, clients: ClientUpdates) -> Tensor:
    """Manhattan and Euclidean distance and cosine to the global parameters, float64 ``[n, 3]``."""
    squared_norm = clients.of_valid(clients.squared_norm)
    manhattan = column_sums(clients, lambda columns: columns.updates.abs().sum(1)).cpu()
    along = dot_products(clients, global_params)
    size = clients.shard.sum_vector(global_params, squared_length).sqrt().cpu()
    length = size * (size.square() + 2 * along + squared_norm).clamp(min=0).sqrt()
    cosine = torch.where(length > 0, (size.square() + along) / length, 0.0)
    return torch.stack([manhattan, squared_norm.sqrt(), cosine], 1)


def whitened_scores(metrics: Tensor) -> Tensor:
    """Mahalanobis lengths of the summed distances between clients, metric by metric; float64 ``[n]``."""
    apart = (metrics[:, None] - metrics).abs().sum(1)
    deviation = apart.std(0, correction=0)
    apart = torch.where(deviation > 1e-12 * apart.amax(0), apart / deviation, 0.0)
    inverse = torch.linalg.pinv(torch.cov(apart.t(), correction=min(1, len(apart) - 1)), rtol=1e-10, hermitian=True)
    scores: Tensor = (apart @ inverse * apart).sum(1).clamp_(min=0).sqrt()
    return scores
