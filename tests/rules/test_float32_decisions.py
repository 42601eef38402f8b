"""Rules that decide by float32 inner products do so only where float64 would decide the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fdcr_fast import Krum, MultiKrum
from fdcr_fast.rules.pairwise import comparison
from tests.support import oracles
from tests.support.rival_rounds import kept

K, P = 13, 5_000


@pytest.fixture
def precisions(monkeypatch):
    """The precisions of the Gram matrices that rules ask for."""
    asked, gram = [], comparison.gram
    monkeypatch.setattr(
        comparison, "gram", lambda *a, precision: asked.append(precision) or gram(*a, precision=precision)
    )
    return asked


def updates(seed):
    """Clients around a common step, each less alike than the one before."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.5, 1.5, K)[rng.permutation(K), None]
    return torch.from_numpy((1 + spread * rng.normal(size=(K, P))).astype(np.float32))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m", [1, 4, None])
def test_multi_krum_that_float32_decides(precisions, seed, m):
    D = updates(seed)
    rule = Krum(num_byzantine=3) if m == 1 else MultiKrum(num_byzantine=3, num_selected=m)
    result = rule.aggregate(torch.zeros(P), D)
    assert precisions == ["float32"]
    _, expected = oracles.multi_krum(D.double().numpy(), 3, K - 3 if m is None else m)
    assert kept(result) == expected
    np.testing.assert_allclose(result.scores, oracles.krum_scores(D.double().numpy(), 3), rtol=1e-5)


@pytest.mark.parametrize("far", [3e-7, 1e-9, 0])
def test_multi_krum_that_float32_cannot_decide(precisions, far):
    D = torch.arange(1.0, K + 1)[:, None].expand(K, P).contiguous()
    D[0] = 50 * torch.randn(P, generator=torch.Generator().manual_seed(0))
    D[1] = D[0].roll(1) * np.float32(1 + far)  # as far from the others, which are constant, but for the factor
    result = MultiKrum(num_byzantine=3, num_selected=K - 1).aggregate(torch.zeros(P), D)
    assert precisions == ["float32", "float64"]
    if far > 1e-7:  # else it is 1 in float32, and rounding chooses
        assert kept(result) == oracles.multi_krum(D.double().numpy(), 3, K - 1)[1]


def test_a_far_client_makes_nobody_elses_distances_doubtful(precisions):
    D = updates(0)
    D[4] *= 1e4
    result = MultiKrum(num_byzantine=3).aggregate(torch.zeros(P), D)
    assert precisions == ["float32"]
    assert kept(result) == oracles.multi_krum(D.double().numpy(), 3, K - 3)[1]


def test_float64_is_never_asked_twice(precisions):
    rule = MultiKrum(num_byzantine=3)
    rule.aggregate(torch.zeros(P, dtype=torch.float64), updates(0).double())
    rule.aggregate(torch.zeros(100), updates(0)[:, :100])  # too few for float32
    assert precisions == ["float64", "float64"]
