from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS, OMNISCIENT_FISHERS, FisherKnowledge

SOURCES = ("honest", "clean", "benign_model", "benign_mean")


def knowledge(size: int = 1000, **fields: Any) -> FisherKnowledge:
    def unexpected() -> torch.Tensor:
        raise AssertionError("none of its business")

    known = FisherKnowledge(
        size, **dict.fromkeys(SOURCES, unexpected), factor=None, generator=torch.Generator().manual_seed(3)
    )
    return dataclasses.replace(known, **fields)


@pytest.mark.parametrize("source", SOURCES)
def test_fishers_that_are_uploaded_as_they_are(source: str) -> None:
    fisher = torch.rand(1000)
    known = knowledge(**{source: lambda: fisher})
    assert torch.equal(ATTACKER_FISHERS[source.replace("_", "-")](known), fisher)


def test_a_random_fisher_has_the_importance_of_the_published_noise() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    forged = ATTACKER_FISHERS["random"](knowledge())
    assert forged.min() == 0

    def importance(values: torch.Tensor) -> torch.Tensor:
        return (values - values.min()) / (values.max() - values.min())

    torch.testing.assert_close(importance(forged), importance(noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("factor", "deviation"), [(None, 0.1), (0.5, 0.5)])
def test_the_noisy_mean_is_multiplied_by_log_normal_noise(factor: float | None, deviation: float) -> None:
    mean = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-6
    mean[:10] = 0
    forged = ATTACKER_FISHERS["noisy-benign-mean"](knowledge(20_000, benign_mean=lambda: mean, factor=factor))
    assert (forged[:10] == 0).all()
    logs = np.log(forged[10:].double().numpy() / mean[10:].double().numpy())
    assert np.std(logs) == pytest.approx(deviation, rel=0.03)
    assert abs(np.mean(logs)) < 5 * deviation / 141


@pytest.mark.parametrize(("factor", "expected"), [(None, 10.0), (0.25, 0.25)])
def test_the_honest_fisher_is_scaled(factor: float | None, expected: float) -> None:
    fisher = torch.rand(1000)
    assert torch.equal(ATTACKER_FISHERS["scaled"](knowledge(honest=lambda: fisher, factor=factor)), fisher * expected)


@pytest.mark.parametrize(("factor", "expected"), [(None, 1.0), (0.25, 0.25)])
def test_a_constant_fisher(factor: float | None, expected: float) -> None:
    assert torch.equal(ATTACKER_FISHERS["constant"](knowledge(factor=factor)), torch.full((1000,), expected))


def test_who_looks_at_others_is_said_in_advance() -> None:
    """Attackers that look at others have to send last, so the table must tell."""
    looked = set()
    for name, forge in ATTACKER_FISHERS.items():

        def look(name: str = name) -> torch.Tensor:
            looked.add(name)
            return torch.rand(1000)

        own: Any = dict.fromkeys(SOURCES, lambda: torch.rand(1000))
        forge(knowledge(**{**own, "benign_mean": look}))
    assert looked == OMNISCIENT_FISHERS


def test_all_fishers_are_tested() -> None:
    copied = {source.replace("_", "-") for source in SOURCES}
    assert set(ATTACKER_FISHERS) == copied | {"random", "noisy-benign-mean", "scaled", "constant"}
