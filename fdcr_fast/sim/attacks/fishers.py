"""Which Fisher attackers upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FisherKnowledge:
    """What an attacker's Fisher may depend on. Fishers ``[P]`` are computed when they are asked for.

    Attributes:
        num_params: ``P``.
        honest: Fisher of its poisoned data, at its own model.
        clean: Fisher of its data before poisoning, at its own model.
        benign_model: Fisher of its data before poisoning, at a model that it trained on them as a benign client would.
        benign_mean: Plain mean over the benign clients' uploads of this round; called by the names in
            ``OMNISCIENT_FISHERS`` alone.
        factor: The choice's parameter; None for its default.
        generator: Source of every random draw.
    """

    num_params: int
    honest: Callable[[], Tensor]
    clean: Callable[[], Tensor]
    benign_model: Callable[[], Tensor]
    benign_mean: Callable[[], Tensor]
    factor: float | None
    generator: torch.Generator

    def factor_or(self, default: float) -> float:
        """The parameter, or its default."""
        return default if self.factor is None else self.factor


def honest(known: FisherKnowledge) -> Tensor:
    """The Fisher of its own, poisoned, data."""
    return known.honest()


def random(known: FisherKnowledge) -> Tensor:
    """Normal noise instead of the Fisher, shifted to start at zero.

    The authors' published server puts ``randn`` in place of the Fisher of the clients that it knows to be
    malicious. Here it is the attacker who does so. Importance is invariant to any affine map of the Fisher,
    so the shift leaves it as it is; it only avoids the negative entries that no Fisher has.
    """
    noise = torch.randn(known.num_params, generator=known.generator)
    return noise - noise.min()


def clean(known: FisherKnowledge) -> Tensor:
    """The Fisher of its data before poisoning."""
    return known.clean()


def benign_model(known: FisherKnowledge) -> Tensor:
    """The Fisher of the benign client that it pretends to be: its model and its data."""
    return known.benign_model()


def benign_mean(known: FisherKnowledge) -> Tensor:
    """The mean of all benign uploads, which an omniscient attacker sees."""
    return known.benign_mean()


def noisy_benign_mean(known: FisherKnowledge) -> Tensor:
    """The mean of all benign uploads times ``exp(factor N(0, 1))`` in every coordinate; ``factor`` is by default 0.1.

    No two attackers send the same.
    """
    mean = known.benign_mean()
    noise = torch.randn(mean.shape, generator=known.generator, dtype=mean.dtype)
    return mean * torch.exp(known.factor_or(0.1) * noise)


def scaled(known: FisherKnowledge) -> Tensor:
    """The honest Fisher times ``factor``, by default 10."""
    return known.honest() * known.factor_or(10.0)


def constant(known: FisherKnowledge) -> Tensor:
    """``factor``, by default 1, in every coordinate. A server that needs importances refuses it by name."""
    return torch.full((known.num_params,), known.factor_or(1.0))


ATTACKER_FISHERS: dict[str, Callable[[FisherKnowledge], Tensor]] = {
    "honest": honest,
    "random": random,
    "clean": clean,
    "benign-model": benign_model,
    "benign-mean": benign_mean,
    "noisy-benign-mean": noisy_benign_mean,
    "scaled": scaled,
    "constant": constant,
}
OMNISCIENT_FISHERS = frozenset({"benign-mean", "noisy-benign-mean"})
