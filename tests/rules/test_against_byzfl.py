"""The rules that ByzFL has, too."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import CoordinateMedian, GeometricMedian, Krum, MultiKrum, TrimmedMean
from tests.support.rival_rounds import assert_step, problem


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), K=st.integers(9, 15), P=st.integers(2, 40), f=st.integers(0, 3))
def test_byzfl_says_the_same(seed, K, P, f):
    byzfl = pytest.importorskip("byzfl")
    given_ = problem(seed, K, P)
    given_.n = [1] * K
    assert_step(given_, given_.apply(TrimmedMean(num_byzantine=f)), byzfl.TrMean(f)(given_.D))
    assert_step(given_, given_.apply(CoordinateMedian()), byzfl.Median()(given_.D))
    # It counts K - f - 1 neighbours, one more than the paper.
    assert_step(given_, given_.apply(Krum(num_byzantine=f)), byzfl.Krum(f + 1)(given_.D))
    several = MultiKrum(num_byzantine=f, num_selected=K - f - 1)
    assert_step(given_, given_.apply(several), byzfl.MultiKrum(f + 1)(given_.D))
    median = byzfl.GeometricMedian(nu=1e-9, T=3000)(given_.D)
    assert_step(given_, given_.apply(GeometricMedian(smoothing=1e-8)), median, rtol=1e-4)
