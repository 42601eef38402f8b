"""The mean of every parameter without its extremes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.byzantine import ByzantineRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import equal_weights


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
        return readings.central_mean(global_params, clients, read, keep, nearest=False)
