"""The plain mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shares import clipped_shares
from fdcr_fast.rules.foreseen import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedAvg(MeanRule):
    """The plain sample-weighted mean ``w' = w + sum_k alpha_k delta_k`` (McMahan et al., 2017).

    Args:
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
        clip: Longer updates are scaled down to this norm, ``alpha_k min(1, clip / ||delta_k||)`` (Sun et al., "Can
            You Really Backdoor Federated Learning?", 2019), or to the median norm with ``"median"``. The weights then
            add up to less than 1.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    sharded = True
    norm_bound: float | None = None
    max_weight_share: float | None = None
    clip: float | Literal["median"] | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if self.clip not in (None, "median") and not (isinstance(self.clip, float | int) and 0 < self.clip < math.inf):
            raise ValueError(f"clip must be None, 'median', or a positive finite norm, got {self.clip!r}")

    @property
    def needs_norms(self) -> bool:
        """Whether updates are clipped."""
        return self.clip is not None

    def buffer_trim(self, kept: int) -> int | None:
        """None, the plain mean, unless updates are bounded."""
        return None if self.norm_bound is None and self.clip is None else super().buffer_trim(kept)

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """Shares of the samples, less for updates that are clipped."""
        shares = self.shares(clients, kept)
        if self.clip is None or not kept.any():
            return shares
        norms = clients.squared_norm.sqrt()
        longest = norms[kept].median() if isinstance(self.clip, str) else self.clip
        return clipped_shares(shares, norms, longest)
