"""Rules that use data of the server, against their papers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given

from fdcr_fast import FedAvg, Finetuning, FLTrust, ModelQuality, Sageflow
from tests.support import oracles
from tests.support.rival_rounds import assert_step, kept, problem, problems, quality


@given(problem=problems)
def test_fltrust(problem):
    own = np.cos(np.arange(len(problem.w)))
    rule = FLTrust(server_update=lambda w: torch.from_numpy(own).float() if w is problem.w else None)
    rule = dataclasses.replace(rule, server_update=lambda w: torch.from_numpy(own))
    result = problem.apply(rule)
    assert_step(problem, result, oracles.fltrust(problem.D, own))
    assert kept(result) == {k for k, d in enumerate(problem.D) if d @ own > 0}


@given(problem=problems)
def test_finetuning_and_sageflow(problem):
    tuned = problem.apply(Finetuning(refine=lambda params: 2 * params)).params
    torch.testing.assert_close(tuned, 2 * problem.apply(FedAvg()).params)
    result = problem.apply(Sageflow(evaluate=quality, entropy_threshold=0.8, loss_exponent=2))
    weights = []
    for update, n in zip(problem.updates, problem.n, strict=True):
        entropy, loss = quality(problem.w + update)
        weights.append(n / loss**2 if entropy <= 0.8 else 0.0)
    assert kept(result) == {k for k, weight in enumerate(weights) if weight}
    assert_step(problem, result, np.array(weights) @ problem.D / (sum(weights) or 1))
    assert set(result.explanation) == set(range(len(problem.n)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_cannot_be_judged_is_dropped(bad):
    given_ = problem(1, 4, 10)
    found = iter([ModelQuality(0.1, 1.0), ModelQuality(bad, 1.0), ModelQuality(0.1, bad), ModelQuality(0.1, 0.0)])
    result = given_.apply(Sageflow(evaluate=lambda _: next(found)))
    assert kept(result) == {0, 3}
    assert result.params.isfinite().all()


def test_functions_of_the_caller_are_checked():
    given_ = problem(1, 4, 10)
    for bad in (torch.zeros(9), None, torch.zeros(10, dtype=torch.int64), torch.full((10,), torch.nan)):
        with pytest.raises(ValueError, match="server_update"):
            given_.apply(FLTrust(server_update=lambda _, bad=bad: bad))
        with pytest.raises(ValueError, match="refine"):
            given_.apply(Finetuning(refine=lambda _, bad=bad: bad))
    with pytest.raises(ValueError, match=r"refine returned is not finite, as torch\.float32"):
        problem(1, 4, 10, torch.float32).apply(
            Finetuning(refine=lambda w: w.new_full((10,), 1e39, dtype=torch.float64))
        )


@pytest.mark.parametrize("size", [1, 100, 1 << 18])
def test_functions_of_the_caller_share_no_memory_with_what_is_given_and_returned(size):
    w, updates, own = torch.ones(size), torch.ones(3, size) * 1.5, torch.zeros(size)
    first = Finetuning(refine=lambda mean: own.add_(mean)).aggregate(w, updates, None, [1] * 3).params
    own.zero_()
    assert first.eq(2.5).all()
    for refine in (lambda _: w, lambda mean: mean[:1].expand(size), lambda mean: mean.zero_().add_(3)):
        params = Finetuning(refine=refine).aggregate(w, updates, None, [1] * 3).params
        params.fill_(9)
        assert w.eq(1).all()
    FLTrust(server_update=lambda params: params.mul_(2)).aggregate(w, updates)
    assert w.eq(1).all()
