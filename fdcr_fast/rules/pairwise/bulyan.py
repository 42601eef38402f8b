"""Krum, one client after the other, and then the mean around the median."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.byzantine import ByzantineRule
from fdcr_fast.rules.pairwise.comparison import squared_distances, valid_gram
from fdcr_fast.rules.pairwise.krum import krum_scores
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import chosen, equal_weights, of_all


@dataclass(frozen=True, kw_only=True)
class Bulyan(ByzantineRule):
    """Krum to choose clients, and of every parameter the values nearest to the median (El Mhamdi et al., ICML 2018).

    ``K - 2 f`` clients are chosen one after the other, each by Krum among those that are left; of every parameter the
    ``K - 4 f`` of their values that lie nearest to their median are averaged. It needs ``K >= 4 f + 3`` clients. All
    chosen clients count alike, whatever their sample counts. ``discrepancy`` holds the Krum scores among all clients.

    Where few clients are left Krum would have no neighbours to count: it then counts the nearest one. Of equal scores
    the one that was smaller among all clients comes first.
    """

    sharded = True

    @classmethod
    def min_clients(cls, num_byzantine: int) -> int:
        """``4 f + 3``."""
        return 4 * num_byzantine + 3

    def select(self, clients: ClientUpdates) -> Selection:
        """Choose by Krum again and again."""
        f = self.tolerated(clients)
        ordered, order = squared_distances(valid_gram(clients)).sort(1)
        left = torch.ones(len(ordered), dtype=torch.bool)
        scores = first = krum_scores(ordered, left[order], f)
        for _ in range(len(ordered) - 2 * f):
            best = scores == scores[left].min()
            left[torch.where(left & best, first, torch.inf).argmin()] = False
            scores = krum_scores(ordered, left[order], f)
        kept = chosen(clients, (~left).nonzero().flatten())
        return Selection(kept, of_all(clients, first), weights=equal_weights(kept))

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The mean around the median over the chosen clients."""
        read = weights != 0
        keep = int(read.sum()) - 2 * self.tolerated(clients)
        return readings.central_mean(global_params, clients, read, keep, nearest=True)
