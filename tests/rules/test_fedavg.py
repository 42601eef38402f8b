"""The weighted mean, of clipped updates and with a limit for each client."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fdcr_fast import FDCR, FedAvg
from tests.support.fdcr_rounds import P, attacked, random_round


@pytest.mark.parametrize("P_", [50, P])
@pytest.mark.parametrize("clip", [0.5, 2.0, "median", 1000.0])
def test_clipped_average(P_, clip):
    w, updates, _, n = attacked()
    w, updates = w[:P_], updates[:, :P_] * torch.logspace(-1, 1, 20)[:, None]
    norms = updates.double().norm(dim=1)
    longest = norms.median() if clip == "median" else clip
    factor = (longest / norms).clamp(max=1)
    expected = w + (n / n.sum() * factor) @ updates.double()
    result = FedAvg(clip=clip).aggregate(w, updates, None, n)
    torch.testing.assert_close(result.params, expected.float())
    torch.testing.assert_close(result.weights, (n / n.sum()).double() * factor, rtol=1e-6, atol=0)
    assert result.kept.all()


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (FedAvg, {"clip": 0.0}),
        (FedAvg, {"clip": math.nan}),
        (FedAvg, {"clip": "mean"}),
        (FedAvg, {"max_weight_share": 0.0}),
        (FDCR, {"max_weight_share": 1.5}),
        (FDCR, {"max_weight_share": math.nan}),
    ],
)
def test_options_are_checked(rule, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        rule(**options)


@pytest.mark.parametrize("seed", range(5))
def test_fedavg_is_the_weighted_mean(seed):
    problem = random_round(seed, 6, 30)
    weights = np.array(problem.n) / sum(problem.n)
    expected = problem.w.double().numpy() + weights @ problem.updates.double().numpy()
    for result in (
        problem.aggregate(FedAvg()),
        FedAvg().aggregate(problem.w, problem.updates, None, torch.tensor(problem.n)),
        FedAvg().aggregate(problem.w, problem.store(tile=7)),
        problem.aggregate(FDCR(cluster=None, rescale=False)),
    ):
        np.testing.assert_allclose(result.params, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(result.weights, weights)
        assert result.kept.all()
        assert not result.labels.any()
