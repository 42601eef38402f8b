"""The point nearest to all updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shares import limited_shares
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.pairwise.comparison import squared_distances, valid_gram
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import of_all

_FAR = 1e6  # times the median norm; from further away only the direction matters, and distances would cancel


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(AggregationRule):
    """The geometric median ``argmin_z sum_k alpha_k ||delta_k - z||`` (Pillutla et al., "Robust Aggregation for
    Federated Learning", 2022: RFA), ``alpha_k = n_k / sum n``.

    By the smoothed Weiszfeld algorithm, ``z = sum_k b_k delta_k`` with ``b_k`` proportional to ``alpha_k / max(nu,
    ||delta_k - z||)``, from the mean on. All distances follow from the Gram matrix, so that the clients are read twice,
    however many steps it takes. ``discrepancy`` holds the distances. Unlike there ``nu`` is relative to how far clients
    lie apart, so that nothing depends on the scale, and updates longer than a million times the median are shortened to
    that.

    Args:
        smoothing: ``nu`` over the median of the clients' median distances to others.
        iterations: Most steps. (The paper takes 3.)
        tolerance: Change of the ``b_k``, in sum, after which no step follows.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest ``alpha_k``, and largest ``b_k`` as well; by default there is no limit.
    """

    sharded = True
    smoothing: float = 1e-6
    iterations: int = 1000
    tolerance: float = 1e-12
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing must be in (0, 1], got {self.smoothing}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}")

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep everybody, with the weights of the last step."""
        alpha = clients.of_valid(self.shares(clients, clients.valid))
        gram = valid_gram(clients)
        norms = gram.diagonal().sqrt()
        longest = _FAR * norms.median()
        factor = torch.where((norms > longest) & (longest > 0), longest / norms, 1.0)
        squares = squared_distances(gram * factor[:, None] * factor)
        weights, distances = self._weiszfeld(squares, alpha)
        weights = limited_shares(weights, self.max_weight_share) * factor
        return Selection(clients.valid, of_all(clients, distances), weights=of_all(clients, weights))

    def _weiszfeld(self, squares: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        apart = squares.sqrt().median(1).values
        if not apart.any():  # more than half of the clients agree with more than half: they are the median
            apart = squares.sqrt()
        nu = self.smoothing * apart[apart > 0].median() if apart.any() else torch.ones(())
        weights = alpha
        for _ in range(self.iterations):
            distances = _distances(squares, weights)
            new = alpha / distances.clamp(min=nu.item())
            new /= new.sum()
            change = (new - weights).abs().sum()
            weights = new
            if change <= self.tolerance:
                break
        return weights, _distances(squares, weights)


def _distances(squares: Tensor, weights: Tensor) -> Tensor:
    """The distances of all clients to the mean with these weights, of sum 1."""
    to_all = squares @ weights
    return (to_all - weights @ to_all / 2).clamp_(min=0).sqrt()
