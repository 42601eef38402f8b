"""Rules that compare clients, against their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fdcr_fast import FLAME, Bulyan, DnC, FoolsGold, GeometricMedian, Krum, MultiKrum, MultiMetrics
from fdcr_fast.rules.pairwise.flame import majority_cluster
from fdcr_fast.rules.pairwise.foolsgold import foolsgold_weights
from fdcr_fast.rules.pairwise.krum import krum_scores
from fdcr_fast.rules.pairwise.multi_metrics import whitened_scores
from tests.support import oracles
from tests.support.rival_rounds import assert_step, drawn_problems, kept, problem, problems


@given(problem=problems, f=st.integers(0, 5), m=st.none() | st.integers(1, 4))
def test_multi_krum_and_krum(problem, f, m):
    K = len(problem.n)
    if 2 * f + 3 > K:
        with pytest.raises(ValueError, match=rf"num_byzantine={f} needs at least {2 * f + 3} clients, got {K}"):
            problem.apply(MultiKrum(num_byzantine=f))
        return
    result = problem.apply(MultiKrum(num_byzantine=f, num_selected=m))
    expected, members = oracles.multi_krum(problem.D, f, K - f if m is None else m)
    np.testing.assert_allclose(result.scores, oracles.krum_scores(problem.D, f), rtol=1e-9)
    assert kept(result) == members
    assert_step(problem, result, expected)
    one = problem.apply(Krum(num_byzantine=f))
    expected, members = oracles.multi_krum(problem.D, f, 1)
    assert kept(one) == members
    assert_step(problem, one, expected)


@given(problem=problems, f=st.integers(0, 3))
def test_bulyan(problem, f):
    K = len(problem.n)
    if 4 * f + 3 > K:
        with pytest.raises(ValueError, match=f"at least {4 * f + 3} clients"):
            problem.apply(Bulyan(num_byzantine=f))
        return
    expected, members = oracles.bulyan(problem.D, f)
    result = problem.apply(Bulyan(num_byzantine=f))
    assert kept(result) == members
    assert_step(problem, result, expected)


@given(problem=problems)
def test_geometric_median(problem):
    result = problem.apply(GeometricMedian(smoothing=1e-9, iterations=20_000))
    D, z = problem.D, result.weights.numpy() @ problem.D
    assert_step(problem, result, z)
    assert abs(result.weights.sum() - 1) < 1e-12
    np.testing.assert_allclose(result.scores, np.linalg.norm(D - z, axis=1), rtol=1e-6, atol=1e-7)

    def cost(z):
        return np.array(problem.n) / sum(problem.n) @ np.linalg.norm(D - z, axis=1)

    expected = oracles.geometric_median(D, problem.n)
    assert cost(z) <= min([cost(expected), *map(cost, D)]) * (1 + 1e-6) + 1e-9


@given(
    seed=st.integers(0, 2**31),
    rounds=st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=4),
    some=st.booleans(),
)
def test_foolsgold_over_rounds(seed, rounds, some):
    rule = FoolsGold(params=slice(3, 11)) if some else FoolsGold()
    history = np.zeros((8, 20))
    for number, members in enumerate(rounds):
        given_ = problem(seed + number, 8, 20, torch.float32)
        given_.updates[1] = given_.updates[0] + 0.01 * given_.updates[1]  # sybils
        ids = sorted(members, key=lambda client: (client * 5) % 8)
        history[ids] += given_.D[ids]
        result = rule.aggregate(given_.w, given_.updates[ids], None, [1] * len(ids), client_ids=ids)
        expected = oracles.foolsgold(history[ids][:, 3:11] if some else history[ids])
        total = expected.sum()
        np.testing.assert_allclose(result.weights, expected / total if total else expected, atol=2e-5)
        assert_step(given_, result, (expected @ given_.D[ids]) / (total or 1), rtol=1e-4)
        rule = rule.with_memory(rule.memory())


@given(problem=problems, f=st.integers(0, 6), fraction=st.sampled_from([0.5, 1.0]))
def test_dnc(problem, f, fraction):
    f = min(f, (len(problem.n) - 1) // 2)
    result = problem.apply(DnC(num_byzantine=f, filter_fraction=fraction, sample=len(problem.w)))
    scores, members = oracles.dnc(problem.D, int(fraction * f))
    np.testing.assert_allclose(result.scores, scores, rtol=1e-6, atol=1e-9 * scores.max())
    assert kept(result) == members
    assert_step(problem, result, problem.D[sorted(members)].mean(0))


def test_dnc_looks_at_samples_of_the_parameters():
    given_ = problem(0, 12, 3000)
    given_.updates[:3] += 1
    result = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3))
    assert kept(result) == set(range(3, 12))
    assert (result.scores.numpy() < oracles.dnc(given_.D, 3)[0] / 50).all()
    again = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3))
    assert torch.equal(again.scores, result.discrepancy)
    other = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3, seed=1))
    assert not torch.equal(other.scores, result.discrepancy)
    given_.w += 1  # another round
    assert not torch.equal(given_.apply(DnC(num_byzantine=3, sample=20)).scores, result.discrepancy)


def hdbscan(distance):
    from sklearn.cluster import HDBSCAN

    n = len(distance)
    clustering = HDBSCAN(min_cluster_size=max(2, n // 2 + 1), min_samples=1, metric="precomputed", copy=True)
    clustering.allow_single_cluster = True
    return clustering.fit(distance).labels_ >= 0


@given(seed=st.integers(0, 2**31), n=st.integers(3, 30), groups=st.integers(1, 4))
def test_the_majority_is_that_of_hdbscan(seed, n, groups):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 2)) + 6 * rng.normal(size=(groups, 2))[rng.integers(0, groups, n)]
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    got = majority_cluster(torch.from_numpy(distance))
    assert got.sum() > n // 2
    np.testing.assert_array_equal(got, hdbscan(distance))


def test_what_is_joined_at_one_distance_belongs_together():
    line = torch.arange(6.0)
    assert majority_cluster((line[:, None] - line).abs()).all()
    line = torch.tensor([0.0, 1, 2, 10, 20, 21])
    assert majority_cluster((line[:, None] - line).abs()).tolist() == [True, True, True, True, False, False]
    assert majority_cluster(torch.zeros(1, 1)).all()
    assert majority_cluster(torch.ones(2, 2).fill_diagonal_(0)).all()


@given(problem=problems)
def test_flame_without_noise(problem):
    result = problem.apply(FLAME(noise=0))
    distance = oracles.model_cosine_distance(problem.w.numpy(), problem.D)
    if len(problem.w) > 2:  # else distances are equal but for rounding
        assert kept(result) == set(majority_cluster(torch.from_numpy(distance)).nonzero().flatten().tolist())
    norms = np.linalg.norm(problem.D, axis=1)
    clipped = problem.D * np.minimum(1, np.median(norms) / norms)[:, None]
    assert_step(problem, result, clipped[sorted(kept(result))].mean(0))
    others = max(1, len(distance) - 1)
    np.testing.assert_allclose(result.scores, distance.sum(1) / others, rtol=1e-6, atol=1e-12)


@given(given_=drawn_problems(clients=(5, 14), params=(3, 40)))
def test_multi_metrics(given_):
    K = len(given_.n)
    expected = oracles.multi_metrics(given_.w.numpy(), given_.D)
    ordered = np.sort(expected)
    assume(ordered[K // 2] - ordered[K // 2 - 1] > 1e-4 * ordered[-1])  # else rounding chooses
    result = given_.apply(MultiMetrics(keep_share=0.5))
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)
    members = sorted(kept(result))  # which of two equal ones rounding decides
    np.testing.assert_allclose(np.sort(expected[members]), np.sort(expected)[: K // 2], rtol=1e-9)
    n = np.array(given_.n)[members]
    assert_step(given_, result, n / n.sum() @ given_.D[members])


def test_metrics_that_tell_nothing_are_left_out():
    assert whitened_scores(torch.ones(4, 3).double()).tolist() == [0] * 4
    assert whitened_scores(torch.ones(1, 3).double()).tolist() == [0]
    metrics = torch.tensor([[1.0, 5, 0], [1, 6, 0], [1, 5.5, 0], [1, 9, 0]], dtype=torch.float64)
    assert whitened_scores(metrics).argmax() == 3


def test_scores_of_many_clients_stay_exact_beside_a_far_one():
    D = problem(11, 12, 20).D
    D[0] = 1e12
    between = torch.from_numpy(oracles.squared_distances(D)).sort(1).values
    got = krum_scores(between, torch.ones_like(between, dtype=torch.bool), 3)
    np.testing.assert_allclose(got, oracles.krum_scores(D, 3), rtol=1e-12)


def test_sybils_lose_their_weight():
    cosine = torch.eye(6, dtype=torch.float64) * 0.9 + 0.1
    cosine[:3, :3] = 1
    weights, _ = foolsgold_weights(cosine)
    assert weights[:3].tolist() == [0, 0, 0]
    assert (weights[3:] == 1).all()
