"""The clients with the closest neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.byzantine import ByzantineRule
from fdcr_fast.rules.pairwise.comparison import squared_distances, valid_gram
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.valid_clients import chosen, equal_weights, of_all


def krum_scores(ordered: Tensor, counted: Tensor, num_byzantine: int) -> Tensor:
    """Sum of a client's squared distances to its ``m - f - 2`` nearest neighbours, at least one, among ``m`` clients.

    Args:
        ordered: Each client's squared distances to all clients in ascending order, its own 0 first, ``[n, n]``.
        counted: Whether each of them is to a client that takes part, bool ``[n, n]``.
        num_byzantine: ``f``.
    """
    rank = counted.cumsum(1)
    neighbours = (rank[:, -1:] - num_byzantine - 2).clamp(min=1)
    return torch.where(counted & (rank <= neighbours + 1), ordered, 0.0).sum(1)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(ByzantineRule):
    """The mean of the ``m`` clients with the smallest Krum scores (Blanchard et al., NeurIPS 2017).

    The score of a client is the sum of its squared distances ``||delta_i - delta_j||^2`` to its ``K - f - 2`` nearest
    neighbours. All kept clients count alike, whatever their sample counts. It needs ``K >= 2 f + 3`` clients.
    ``discrepancy`` holds the scores.

    Args:
        num_selected: ``m``; by default ``K - f``, as is common. (The paper proves its bounds for less than
            ``K - 2 f``.)
    """

    sharded = True
    num_selected: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_selected is not None and self.num_selected < 1:
            raise ValueError(f"num_selected must be at least 1, got {self.num_selected}")

    @classmethod
    def min_clients(cls, num_byzantine: int) -> int:
        """``2 f + 3``: else a client has no neighbours that count."""
        return 2 * num_byzantine + 3

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep those with the smallest scores, of equal ones the first."""
        f = self.tolerated(clients)
        ordered = squared_distances(valid_gram(clients)).sort(1).values
        scores = krum_scores(ordered, torch.ones_like(ordered, dtype=torch.bool), f)
        m = len(scores) - f if self.num_selected is None else self.num_selected
        kept = chosen(clients, scores.argsort(stable=True)[:m])
        return Selection(kept, of_all(clients, scores), weights=equal_weights(kept))


@dataclass(frozen=True, kw_only=True)
class Krum(MultiKrum):
    """The one client with the smallest Krum score (Blanchard et al., NeurIPS 2017); see :class:`MultiKrum`."""

    num_selected: int | None = field(default=1, init=False, repr=False)
