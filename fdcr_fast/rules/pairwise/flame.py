"""The majority of the models, clipped and with noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import dot_products, squared_length
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.pairwise.comparison import cosines, valid_gram
from fdcr_fast.rules.randomness import check_deviation, round_generator, with_noise
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.valid_clients import equal_weights, of_all


@dataclass(frozen=True, kw_only=True)
class FLAME(AggregationRule):
    """Cluster, clip and add noise (Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX Security
    2022, Algorithm 1).

    HDBSCAN on the cosine distances of the local models ``w + delta_k``, with clusters of at least ``K / 2 + 1`` clients
    (rounded down), admits the majority (see :func:`majority_cluster`); the updates of those are clipped to the median
    norm ``S`` of all clients and averaged, all alike whatever their sample counts; and noise of standard deviation
    ``noise * S`` is added. ``discrepancy`` holds each client's mean cosine distance to the others.

    Args:
        noise: ``lambda``. (The paper takes 0.001 for images.)
        seed: Seed of the noise, to be kept secret; see :func:`fdcr_fast.rules.randomness.round_generator`.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
    """

    weighs_samples = False
    sharded = True
    noise: float = 0.001
    seed: int = 0
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        check_deviation("noise", self.noise)

    @classmethod
    def from_options(cls, options: ServerOptions) -> FLAME:
        """The rule with the server's secret seed."""
        return cls(seed=options.noise_seed)

    @property
    def needs_norms(self) -> bool:
        """True: updates are clipped."""
        return True

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Keep the majority cluster."""
        along = dot_products(clients, global_params)
        squared = clients.shard.sum_vector(global_params, squared_length).cpu()
        distance = 1 - cosines(valid_gram(clients) + along[:, None] + along + squared)
        kept = of_all(clients, majority_cluster(distance))
        norms = clients.squared_norm.sqrt()
        clip = torch.where(norms > 0, self._median_norm(clients) / norms, 1.0).clamp(max=1)
        others = max(1, len(distance) - 1)
        return Selection(kept, of_all(clients, distance.sum(1) / others), weights=equal_weights(kept) * clip)

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """The mean of the clipped updates, with noise."""
        params = super().combine(global_params, clients, weights)
        generator = round_generator(self.seed, "FLAME", clients.shard.gather(global_params))
        return with_noise(params, self.noise * self._median_norm(clients), generator, clients)

    @staticmethod
    def _median_norm(clients: ClientUpdates) -> float:
        return clients.of_valid(clients.squared_norm).sqrt().quantile(0.5).item()


def majority_cluster(distance: Tensor) -> Tensor:
    """The cluster that HDBSCAN finds where one must hold more than half of all points, bool ``[n]``.

    No two clusters of that size fit side by side, so what HDBSCAN's hierarchy comes to (with one sample per core point,
    and a single cluster allowed) is the first connected component of more than half of the points, as points at ever
    larger distances are joined; a component takes in all that is joined at the same distance.

    Args:
        distance: Between all pairs of points, ``[n, n]``.
    """
    n = len(distance)
    component = torch.arange(n)
    joined = _spanning_tree(distance)
    for i, (length, a, b) in enumerate(joined):
        component[component == component[b]] = component[a].item()
        complete = i + 1 == len(joined) or joined[i + 1][0] > length
        if complete and (largest := component.bincount()).max() > n // 2:
            return component == largest.argmax()
    return torch.ones(n, dtype=torch.bool)  # a single point


def _spanning_tree(distance: Tensor) -> list[tuple[float, int, int]]:
    """Edges (length, one end, other end) of a minimum spanning tree, the shortest first (Prim's algorithm)."""
    n = len(distance)
    outside = torch.ones(n, dtype=torch.bool)
    outside[0] = False
    nearest, parent, edges = distance[0].clone(), torch.zeros(n, dtype=torch.int64), []
    for _ in range(n - 1):
        new = int(torch.where(outside, nearest, torch.inf).argmin())
        edges.append((nearest[new].item(), int(parent[new]), new))
        outside[new] = False
        closer = distance[new] < nearest
        nearest = torch.where(closer, distance[new], nearest)
        parent[closer] = new
    return sorted(edges)
