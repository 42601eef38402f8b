"""Rules of every parameter by itself, against their papers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import RLR, CoordinateMedian, TrimmedMean
from tests.support import oracles
from tests.support.rival_rounds import assert_step, problems


@given(problem=problems)
def test_median(problem):
    assert_step(problem, problem.apply(CoordinateMedian()), np.median(problem.D, 0))


@given(problem=problems, f=st.integers(0, 6))
def test_trimmed_mean(problem, f):
    f = min(f, (len(problem.n) - 1) // 2)
    assert_step(problem, problem.apply(TrimmedMean(num_byzantine=f)), oracles.trimmed_mean(problem.D, f))


@given(problem=problems, threshold=st.integers(0, 15))
def test_robust_learning_rate(problem, threshold):
    result = problem.apply(RLR(threshold=threshold))
    assert_step(problem, result, oracles.robust_learning_rate(problem.D, problem.n, threshold))
