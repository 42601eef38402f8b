from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES, COLLUDING_UPDATES, Moments, UpdateKnowledge, moments


def unexpected() -> Any:
    raise AssertionError("none of its business")


def knowledge(**fields: Any) -> UpdateKnowledge:
    update = torch.randn(30, generator=torch.Generator().manual_seed(5))
    known = UpdateKnowledge(
        update=update,
        seen=unexpected,
        factor=None,
        norm=unexpected,
        benign=unexpected,
        params=unexpected,
        features=unexpected,
        clients=10,
        attackers=4,
        generator=torch.Generator().manual_seed(0),
    )
    return dataclasses.replace(known, **fields)


def others(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 30, generator=torch.Generator().manual_seed(6)) + 3


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(0, 6),
    num_params=st.integers(0, 9),
    offset=st.sampled_from([0.0, 1e4]),
    scale=st.sampled_from([1.0, 1e-30, 1e18]),
    seed=st.integers(0, 99),
)
def test_moments_are_mean_and_sample_deviation(
    count: int, num_params: int, offset: float, scale: float, seed: int
) -> None:
    vectors = (np.random.default_rng(seed).normal(offset, 1, (count, num_params)) * scale).astype(np.float32)
    exact = vectors.astype(np.float64)
    found = moments((torch.from_numpy(vector) for vector in vectors), num_params)
    mean = exact.mean(0) if count else np.zeros(num_params)
    std = exact.std(0, ddof=1) if count > 1 else np.zeros(num_params)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(found.std.numpy(), std, rtol=1e-7, atol=1e-9 * scale)


def test_a_plain_update_is_sent_as_it_is() -> None:
    known = knowledge()
    assert torch.equal(ATTACKER_UPDATES["plain"](known), known.update)


@pytest.mark.parametrize(("factor", "expected"), [(None, 2.5), (8.0, 8.0), (0.5, 0.5)])
def test_scaling_is_exact(factor: float | None, expected: float) -> None:
    known = knowledge(factor=factor)
    assert torch.equal(ATTACKER_UPDATES["scale"](known), known.update * expected)


def test_scaling_replaces_the_model() -> None:
    """The mean over all clients becomes the attackers' model where the others have nothing to add."""
    known = knowledge()
    sent = ATTACKER_UPDATES["scale"](known)
    torch.testing.assert_close((4 * sent + 6 * torch.zeros(30)) / 10, known.update)


@pytest.mark.parametrize("norm", [1e-6, 3.0, 1e6])
def test_norms_are_matched(norm: float) -> None:
    known = knowledge(norm=lambda: norm)
    sent = ATTACKER_UPDATES["norm-match"](known).double()
    assert sent.norm().item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(sent / sent.norm(), known.update.double() / known.update.double().norm())
    zero = torch.zeros(30)
    assert torch.equal(ATTACKER_UPDATES["norm-match"](knowledge(update=zero, norm=lambda: norm)), zero)


FEATURES = torch.arange(30) % 3 > 0


def of_a_model(params: torch.Tensor, benign: torch.Tensor, **fields: Any) -> UpdateKnowledge:
    return knowledge(params=lambda: params, benign=lambda: benign, features=lambda: FEATURES, **fields)


def cosine(update: torch.Tensor, params: torch.Tensor) -> float:
    """Over the features, by NumPy."""
    a, b = (vector[FEATURES].double().numpy() for vector in (update, params))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 99),
    pull=st.sampled_from([-3.0, 0.0, 0.1, 3.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_a_multiple_of_the_model_gives_the_cosine_of_clean_data(seed: int, pull: float, scale: float) -> None:
    """Nothing else of the update changes."""
    params, noise = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    benign = (noise + pull * params) * scale
    known = of_a_model(params, benign)
    sent = ATTACKER_UPDATES["add-model"](known)
    assert sent.dtype == torch.float32
    assert cosine(sent, params) == pytest.approx(cosine(benign, params), abs=1e-5)
    added, along = (sent - known.update).double().numpy(), torch.where(FEATURES, params, 0.0).double().numpy()
    np.testing.assert_allclose(added, (added @ along) / (along @ along) * along, atol=1e-5)


def test_a_given_multiple_of_the_model() -> None:
    params, update = torch.randn(30, generator=torch.Generator().manual_seed(1)), knowledge().update
    known = dataclasses.replace(of_a_model(params, update, factor=0.25), benign=unexpected)
    expected = update.double().numpy() + 0.25 * np.where(FEATURES.numpy(), params.double().numpy(), 0)
    np.testing.assert_allclose(ATTACKER_UPDATES["add-model"](known).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("empty", ["params", "benign"])
def test_no_multiple_is_added_where_none_gives_the_cosine(empty: str) -> None:
    vectors = {"params": torch.ones(30), "benign": torch.arange(30.0)} | {empty: torch.zeros(30)}
    known = of_a_model(**vectors)
    assert torch.equal(ATTACKER_UPDATES["add-model"](known), known.update)


def numpy_attack(name: str, honest: np.ndarray, factor: float | None) -> np.ndarray:
    """A transcription of ByzFL 0.0.11."""
    if name == "sign-flip":
        return -np.mean(honest, axis=0)
    if name == "ipm":
        return -(2.0 if factor is None else factor) * np.mean(honest, axis=0)
    return np.mean(honest, axis=0) + (1.5 if factor is None else factor) * np.sqrt(np.var(honest, axis=0, ddof=1))


@pytest.mark.parametrize("name", sorted(COLLUDING_UPDATES))
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("count", [2, 7])
def test_attacks_on_the_mean(name: str, factor: float | None, count: int) -> None:
    honest = others(count)
    sent = ATTACKER_UPDATES[name](knowledge(factor=factor, seen=lambda: moments(honest, 30)))
    assert sent.dtype == torch.float32
    expected = numpy_attack(name, honest.double().numpy(), factor)
    np.testing.assert_allclose(sent.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [None, 0.7])
def test_attacks_agree_with_byzfl(factor: float | None) -> None:
    byzfl = pytest.importorskip("byzfl")
    oracles = {
        "sign-flip": byzfl.SignFlipping(),
        "ipm": byzfl.InnerProductManipulation(*[factor] * (factor is not None)),
        "alie": byzfl.ALittleIsEnough(*[factor] * (factor is not None)),
    }
    assert set(oracles) == COLLUDING_UPDATES
    honest = others()
    for name, oracle in oracles.items():
        sent = ATTACKER_UPDATES[name](knowledge(factor=factor, seen=lambda: moments(honest, 30)))
        np.testing.assert_allclose(sent.numpy(), oracle(honest.double().numpy()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("factor", "deviation"), [(None, 1.0), (0.01, 0.01)])
def test_gaussian_noise(factor: float | None, deviation: float) -> None:
    sent, other = (
        ATTACKER_UPDATES["gaussian"](
            knowledge(update=torch.zeros(10_000), factor=factor, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (0, 1)
    )
    assert not torch.equal(sent, other)
    for noise in (sent, other):
        assert abs(noise.mean()) < 5 * deviation / 100
        assert noise.std().item() == pytest.approx(deviation, rel=5 / 141)
        assert (noise.abs() < 2 * deviation).float().mean().item() == pytest.approx(0.954, abs=0.01)


def test_who_looks_at_others_is_said_in_advance() -> None:
    """Attackers that look at others have to send last, so the table must tell."""
    looked = set()
    for name, attack in ATTACKER_UPDATES.items():

        def look(name: str = name) -> Moments:
            looked.add(name)
            return moments(others(), 30)

        attack(of_a_model(torch.ones(30), torch.arange(30.0), seen=look, norm=lambda: 1.0))
    assert looked == COLLUDING_UPDATES


def test_all_updates_are_tested() -> None:
    tested = {"plain", "scale", "norm-match", "add-model", "sign-flip", "gaussian", "alie", "ipm"}
    assert set(ATTACKER_UPDATES) == tested
