"""Rules of every parameter by itself, against their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import RLR, AlignIns, CoordinateMedian, TrimmedMean
from fdcr_fast.round import columns
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.coordinatewise.alignins import least_of_largest
from tests.support import oracles
from tests.support.rival_rounds import Problem, assert_step, kept, problem, problems


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


@given(
    problem=problems,
    share=st.sampled_from([0.05, 0.3, 1.0]),
    direction_radius=st.sampled_from([0.7, 1.0, 1.6]),
    sign_radius=st.sampled_from([0.7, 1.0, 1.6]),
)
def test_alignins(problem, share, direction_radius, sign_radius):
    rule = AlignIns(top_share=share, direction_radius=direction_radius, sign_radius=sign_radius)
    result = problem.apply(rule)
    cosine, signs, scores, members, step = oracles.alignins(
        problem.w.double().numpy(), problem.D, share, direction_radius, sign_radius
    )
    said = [result.explanation[k] for k in range(len(problem.n))]
    np.testing.assert_allclose([one.direction for one in said], cosine, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose([one.signs for one in said], signs, rtol=1e-12)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-6, atol=1e-6)
    if np.abs(scores - 1).min() > 1e-6 or len(problem.n) < 3:  # else rounding decides
        assert kept(result) == members
        assert_step(problem, result, step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("together", [1 << 24, 2000])
def test_the_largest_coordinates_end_where_sorting_says(dtype, together, monkeypatch):
    monkeypatch.setattr(columns, "_MODELS", together)  # few are read in several batches
    given_ = problem(3, 9, 700, dtype)
    given_.updates[1] = 0
    given_.updates[2, :500] = -given_.updates[2, 0]
    given_.updates[3] *= 1e-3
    given_.updates[4, ::2] = torch.finfo(dtype).tiny / 4  # not normal
    given_.updates[5, 3] = torch.nan
    clients = ClientUpdates.from_matrices(given_.updates, None, given_.n).with_valid(torch.arange(9) != 5)
    rows = [0, 1, 2, 3, 4, 6, 7, 8]
    values = given_.updates[rows].double().abs().sort(1, descending=True).values
    for count in (1, 210, 499, 699, 700):
        assert torch.equal(least_of_largest(clients, count), values[:, count - 1])


def test_equal_values_at_the_edge_count_with_one_fraction():
    updates = torch.tensor([[3.0, 1, 1, -1, 0.5]] * 2 + [[3.0, 1, 1, 1, 0.5]] * 3)
    result = Problem(torch.ones(5), updates, [1] * 5).apply(AlignIns(top_share=0.4))
    # Two of five count: the first, and one of three equal ones, of which two have the principal sign, or all.
    assert [one.signs for one in result.explanation.values()] == pytest.approx([(1 + 2 / 3) / 2] * 2 + [1.0] * 3)


def test_alignins_drops_who_points_elsewhere_and_clips_the_others():
    given_ = problem(5, 10, 400)
    common = given_.w / 10
    given_.updates[:] = common + 0.1 * given_.updates
    given_.updates[3] = -common
    given_.updates[6] *= 1000
    result = given_.apply(AlignIns(direction_radius=2.0, sign_radius=2.0))
    assert kept(result) == set(range(10)) - {3}
    assert result.scores[3] > 1
    norms = torch.from_numpy(np.linalg.norm(given_.D[sorted(kept(result))], axis=1))
    lengths = result.weights[result.kept] * norms
    assert lengths.max() == pytest.approx(norms.quantile(0.5).item() / 9)


def test_alignins_keeps_nobody_where_nobody_is_usual_in_both():
    w = torch.ones(3, dtype=torch.float64)
    updates = torch.tensor([[1.0, 2, -3], [1, -2, 3], [-1, 2, 3], [1, 2, 3]], dtype=torch.float64)
    result = Problem(w, updates, [1] * 4).apply(AlignIns(direction_radius=1e-3, sign_radius=1e-3))
    assert not result.kept.any()
    assert torch.equal(result.params, w)
