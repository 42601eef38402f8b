"""The mean, clipped and with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import squared_length
from fdcr_fast.rules.foreseen import MeanRule
from fdcr_fast.rules.randomness import check_deviation, round_generator, with_noise
from fdcr_fast.rules.server_options import ServerOptions


@dataclass(frozen=True, kw_only=True)
class CRFL(MeanRule):
    """Clip the averaged global parameters and add noise (Xie et al., "CRFL: Certifiably Robust Federated Learning
    against Backdoor Attacks", ICML 2021, Algorithm 1).

    ``w'' = w' / max(1, ||w'|| / param_norm) + N(0, noise^2)`` with ``w'`` of FedAvg. The smoothed prediction that the
    certificate of the paper is about is no part of aggregation. There the last round adds no noise, here every one
    does.

    Args:
        param_norm: Longest vector of global parameters. (The paper takes 15 for MNIST.)
        noise: Standard deviation of the noise.
        seed: Seed of the noise, to be kept secret; see :func:`fdcr_fast.rules.randomness.round_generator`.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    sharded = True
    param_norm: float = 15.0
    noise: float = 0.01
    seed: int = 0
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if not 0 < self.param_norm < math.inf:
            raise ValueError(f"param_norm must be positive and finite, got {self.param_norm}")
        check_deviation("noise", self.noise)

    @classmethod
    def from_options(cls, options: ServerOptions) -> CRFL:
        """The rule with the server's secret seed."""
        return cls(seed=options.noise_seed)

    def of_mean(self, global_params: Tensor, clients: ClientUpdates, mean: Tensor) -> Tensor:
        """The mean, clipped, with noise."""
        norm = clients.shard.sum_vector(mean, squared_length).sqrt().item()
        generator = round_generator(self.seed, "CRFL", clients.shard.gather(global_params))
        if norm > self.param_norm:
            mean = mean.mul_(self.param_norm / norm)
        return with_noise(mean, self.noise, generator, clients)
