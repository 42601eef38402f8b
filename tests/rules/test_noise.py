"""What rules draw: the noise of FLAME and CRFL, and samples; and what CRFL clips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fdcr_fast import CRFL, FLAME, DnC, FedAvg
from fdcr_fast.rules.randomness import distinct
from tests.support.rival_rounds import problem


def test_noise_has_the_deviation_that_was_asked_for_and_is_new_in_every_round():
    given_ = problem(0, 9, 20_000)
    quiet, loud = given_.apply(FLAME(noise=0)), given_.apply(FLAME(noise=0.5))
    deviation = (loud.params - quiet.params).std().item()
    assert abs(deviation / (0.5 * np.median(np.linalg.norm(given_.D, axis=1))) - 1) < 0.05
    plain, clipped = given_.apply(FedAvg()).params, given_.apply(CRFL(param_norm=3, noise=0)).params
    torch.testing.assert_close(clipped, plain * 3 / plain.norm())
    torch.testing.assert_close(given_.apply(CRFL(param_norm=1e9, noise=0)).params, plain)
    noisy = given_.apply(CRFL(param_norm=3, noise=0.2)).params
    assert abs((noisy - clipped).std().item() / 0.2 - 1) < 0.05
    assert torch.equal(given_.apply(CRFL(param_norm=3, noise=0.2)).params, noisy)
    assert not torch.equal(given_.apply(CRFL(param_norm=3, noise=0.2, seed=1)).params, noisy)
    given_.w += 1
    moved = given_.apply(CRFL(param_norm=1e9, noise=0.2)).params - given_.apply(FedAvg()).params
    assert not torch.allclose(moved, noisy - clipped)


@pytest.mark.parametrize("rule", [FLAME(noise=0.1), CRFL(noise=0.1), DnC(num_byzantine=1)])
@pytest.mark.parametrize("size", [1, 3])
def test_draws_do_not_depend_on_how_parameters_lie(rule, size):
    w, updates = torch.arange(1.0, size + 1), torch.randn(4, size)
    strided = torch.zeros(2 * size)[::2].copy_(w)
    expected, result = (rule.aggregate(params, updates, None, [1] * 4).params for params in (w, strided))
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("count", "below"), [(2, 6), (3, 6), (4, 6), (6, 6)])
def test_every_set_is_drawn_equally_often(count, below):
    generator, draws = torch.Generator().manual_seed(0), 6000
    seen = dict.fromkeys(itertools.combinations(range(below), count), 0)
    for _ in range(draws):
        seen[tuple(distinct(count, below, generator).tolist())] += 1
    expected = draws / len(seen)
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < len(seen) - 1 + 4 * (2 * len(seen)) ** 0.5
