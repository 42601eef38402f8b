"""The median of every parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.valid_clients import equal_weights


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(AggregationRule):
    """The median of every parameter, ``w'[v] = w[v] + median_k delta_k[v]`` (Yin et al., ICML 2018, Definition 1).

    Of an even number of clients the mean of the middle two. All clients count alike, whatever their sample counts.

    Args:
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
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
        return readings.central_mean(global_params, clients, read, 2 - int(read.sum()) % 2, nearest=False)
