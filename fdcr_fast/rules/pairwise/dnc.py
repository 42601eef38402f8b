"""Outliers in the direction in which clients differ most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.vectors import sent
from fdcr_fast.rules.byzantine import ByzantineRule
from fdcr_fast.rules.pairwise.gram import gram
from fdcr_fast.rules.randomness import distinct, round_generator
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.valid_clients import equal_weights, of_all


@dataclass(frozen=True, kw_only=True)
class DnC(ByzantineRule):
    """Divide and conquer (Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, Algorithm 2).

    Of a random sample of the parameters, clients in the rows and centred over them, the squared projections on the
    first right singular vector are the outlier scores; the ``filter_fraction * f`` clients with the largest are
    dropped. Those who are never dropped in several samples are averaged, all alike whatever their sample counts.
    The projections come from the eigenvector of the clients' inner products, so that no vector of the sample's size is
    iterated on. It needs ``K >= 2 f + 1`` clients. ``discrepancy`` holds the largest score over the samples.

    Args:
        iterations: Number of samples.
        sample: Number of parameters in each, or all where there are not so many.
        filter_fraction: Number of clients that are dropped in each as a part of ``f``, rounded down.
        seed: Seed of the draws, to be kept secret; see :func:`fdcr_fast.rules.randomness.round_generator`.
    """

    sharded = True
    iterations: int = 5
    sample: int = 10_000
    filter_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.sample < 1:
            raise ValueError(f"iterations and sample must be at least 1, got {self.iterations} and {self.sample}")
        if not 0 <= self.filter_fraction <= 1:
            raise ValueError(f"filter_fraction must be in [0, 1], got {self.filter_fraction}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> DnC:
        """The rule with the server's assumption and secret seed."""
        return cls(num_byzantine=options.num_byzantine, seed=options.noise_seed)

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep those that no sample drops."""
        drop = int(self.filter_fraction * self.tolerated(clients))
        n = int(clients.valid.sum())
        generator = round_generator(self.seed, "DnC", clients.shard.gather(global_params))
        size, of = min(self.sample, clients.num_params), clients.num_params
        good = torch.ones(n, dtype=torch.bool)
        worst = torch.zeros(n, dtype=torch.float64)
        drawn = torch.stack([distinct(size, of, generator) for _ in range(self.iterations)])
        for updates in _samples(clients, drawn):
            scores = outlier_scores(updates)
            good[scores.argsort(descending=True, stable=True)[:drop]] = False
            worst = torch.maximum(worst, scores)
        kept = of_all(clients, good)
        return Selection(kept, of_all(clients, worst), weights=equal_weights(kept))


def outlier_scores(updates: Tensor) -> Tensor:
    """Squared projections of the centred rows ``[n, m]`` on their first right singular vector, float64 ``[n]``."""
    centred = updates - updates.mean(0)
    low, high = centred.aminmax()
    size = torch.maximum(-low, high)
    if size == 0:
        return torch.zeros(len(updates), dtype=torch.float64)
    centred /= size
    # The library's product: that of PyTorch has other bits with other numbers of threads.
    values, vectors = torch.linalg.eigh(gram(centred, precision="float64"))
    scores: Tensor = values[-1] * vectors[:, -1].square() * size**2
    return scores


def _samples(clients: ClientUpdates, drawn: Tensor) -> Tensor:
    """The drawn parameters ``[S, m]``, ascending, of the valid clients in one reading, float64 ``[S, n, m]``."""
    result = torch.zeros(len(drawn), clients.num_valid, drawn.shape[1], dtype=torch.float64)
    for span in clients.spans():
        first = clients.shard.first + span.first
        ends = torch.tensor([first, first + span.num_params]).expand(len(drawn), 2).contiguous()
        for sample, params, (low, high) in zip(result, drawn, torch.searchsorted(drawn, ends).tolist(), strict=True):
            place = sent(params[low:high] - first, span.updates.device)
            sample[:, low:high] = clients.of_valid(_at(span.updates, place).cpu())
    return clients.shard.sum_parts(result)


def _at(updates: Tensor, place: Tensor) -> Tensor:
    """Columns of tiles ``[T, K, L]`` as ``[K, m]``: of one tile row by row, since those of a row lie together."""
    tiles, clients, length = updates.shape
    if tiles == 1:
        return updates[0].gather(1, place.expand(clients, -1))
    return updates[place // length, :, place % length].t()
