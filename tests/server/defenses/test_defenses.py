"""Every rule against its paper, and what all rules have in common."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fdcr_fast
from fdcr_fast import (
    CRFL,
    FLAME,
    RLR,
    AggregationRule,
    Bulyan,
    CoordinateMedian,
    DnC,
    FedAvg,
    Finetuning,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    ModelQuality,
    MultiKrum,
    MultiMetrics,
    Sageflow,
    TrimmedMean,
    UpdateStore,
    _native,
)
from fdcr_fast.rules.pairwise.flame import majority_cluster
from fdcr_fast.rules.pairwise.foolsgold import foolsgold_weights
from fdcr_fast.rules.pairwise.krum import krum_scores
from fdcr_fast.rules.pairwise.multi_metrics import whitened_scores


def quality(params):
    size = params.double().norm().item()
    return ModelQuality(0.5 + math.sin(size) / 2, 1 + size % 1)


def toward_one(params):
    return 0.1 * torch.ones_like(params)


# Rules that take rounds of any size.
RULES = {
    "median": lambda: CoordinateMedian(),
    "trimmed mean": lambda: TrimmedMean(num_byzantine=0),
    "krum": lambda: Krum(num_byzantine=1),
    "multi-krum": lambda: MultiKrum(num_byzantine=2),
    "bulyan": lambda: Bulyan(num_byzantine=1),
    "geometric median": lambda: GeometricMedian(),
    "rlr": lambda: RLR(threshold=3),
    "foolsgold": lambda: FoolsGold(),
    "dnc": lambda: DnC(num_byzantine=2),
    "flame": lambda: FLAME(noise=0.01),
    "crfl": lambda: CRFL(param_norm=2.0, noise=0.1),
    "multi-metrics": lambda: MultiMetrics(keep_share=0.5),
    "fltrust": lambda: FLTrust(server_update=toward_one),
    "finetuning": lambda: Finetuning(refine=lambda params: params + toward_one(params)),
    "sageflow": lambda: Sageflow(evaluate=quality, entropy_threshold=0.9),
}
CLASSES = {type(make()) for make in RULES.values()}
NEEDS = {"krum": 5, "multi-krum": 7, "bulyan": 7, "dnc": 5}


@dataclasses.dataclass
class Problem:
    w: torch.Tensor
    updates: torch.Tensor
    n: list[int]

    @property
    def D(self):  # noqa: N802
        return self.updates.double().numpy()

    def apply(self, rule, **options):
        return rule.aggregate(self.w, self.updates, None, self.n, **options)

    def store(self, path=None):
        K, P = self.updates.shape
        where = {} if path is None else {"path": path, "max_resident": 1 << 20, "sync": False}
        store = UpdateStore(P, K, self.updates.dtype, with_fishers=False, **where)
        for client, update in enumerate(self.updates):
            assert store.put(update, None, self.n[client])
        return store


def problem(seed, K, P, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    spread = rng.lognormal(0, 0.5, (K, 1))
    common = rng.normal(size=P)
    return Problem(
        torch.from_numpy(rng.normal(size=P)).to(dtype),
        torch.from_numpy((common + spread * rng.normal(size=(K, P))) / 10).to(dtype),
        rng.integers(1, 100, K).tolist(),
    )


problems = st.builds(
    problem, st.integers(0, 2**31), st.integers(1, 14), st.integers(1, 60), st.sampled_from([torch.float64])
)


def assert_step(given, result, expected, rtol=1e-9):
    step = result.params.double().numpy() - given.w.double().numpy()
    size = np.abs(given.w.double().numpy()).max() + np.abs(given.D).max()
    np.testing.assert_allclose(step, expected, rtol=rtol, atol=rtol * size)


def kept(result):
    return {client for client, is_kept in zip(result.clients, result.kept.tolist(), strict=True) if is_kept}


# --- each rule against its paper


@given(problem=problems)
def test_median(problem):
    assert_step(problem, problem.apply(CoordinateMedian()), np.median(problem.D, 0))


@given(problem=problems, f=st.integers(0, 6))
def test_trimmed_mean(problem, f):
    f = min(f, (len(problem.n) - 1) // 2)
    assert_step(problem, problem.apply(TrimmedMean(num_byzantine=f)), oracles.trimmed_mean(problem.D, f))


@given(problem=problems, f=st.integers(0, 5), m=st.none() | st.integers(1, 4))
def test_multi_krum_and_krum(problem, f, m):
    K = len(problem.n)
    if 2 * f + 3 > K:
        with pytest.raises(ValueError, match=rf"num_byzantine={f} needs at least {2 * f + 3} clients, got {K}"):
            problem.apply(MultiKrum(num_byzantine=f))
        return
    result = problem.apply(MultiKrum(num_byzantine=f, num_selected=m))
    expected, members = oracles.multi_krum(problem.D, f, K - f if m is None else m)
    np.testing.assert_allclose(result.discrepancy, oracles.krum_scores(problem.D, f), rtol=1e-9)
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
    np.testing.assert_allclose(result.discrepancy, np.linalg.norm(D - z, axis=1), rtol=1e-6, atol=1e-7)

    def cost(z):
        return np.array(problem.n) / sum(problem.n) @ np.linalg.norm(D - z, axis=1)

    expected = oracles.geometric_median(D, problem.n)
    assert cost(z) <= min([cost(expected), *map(cost, D)]) * (1 + 1e-6) + 1e-9


@given(problem=problems, threshold=st.integers(0, 15))
def test_robust_learning_rate(problem, threshold):
    result = problem.apply(RLR(threshold=threshold))
    assert_step(problem, result, oracles.robust_learning_rate(problem.D, problem.n, threshold))


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
    result = problem.apply(DnC(num_byzantine=f, filter_fraction=fraction))
    scores, members = oracles.dnc(problem.D, int(fraction * f))
    np.testing.assert_allclose(result.discrepancy, scores, rtol=1e-6, atol=1e-9 * scores.max())
    assert kept(result) == members
    assert_step(problem, result, problem.D[sorted(members)].mean(0))


def test_dnc_looks_at_samples_of_the_parameters():
    given_ = problem(0, 12, 3000)
    given_.updates[:3] += 1
    result = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3))
    assert kept(result) == set(range(3, 12))
    assert (result.discrepancy.numpy() < oracles.dnc(given_.D, 3)[0] / 50).all()
    again = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3))
    assert torch.equal(again.discrepancy, result.discrepancy)
    other = given_.apply(DnC(num_byzantine=3, sample=20, iterations=3, seed=1))
    assert not torch.equal(other.discrepancy, result.discrepancy)
    given_.w += 1  # another round
    assert not torch.equal(given_.apply(DnC(num_byzantine=3, sample=20)).discrepancy, result.discrepancy)


@given(problem=problems)
def test_fltrust(problem):
    own = np.cos(np.arange(len(problem.w)))
    rule = FLTrust(server_update=lambda w: torch.from_numpy(own).float() if w is problem.w else None)
    rule = dataclasses.replace(rule, server_update=lambda w: torch.from_numpy(own))
    result = problem.apply(rule)
    assert_step(problem, result, oracles.fltrust(problem.D, own))
    assert kept(result) == {k for k, d in enumerate(problem.D) if d @ own > 0}


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
    np.testing.assert_allclose(result.discrepancy, distance.sum(1) / others, rtol=1e-6, atol=1e-12)


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


@given(seed=st.integers(0, 2**31), K=st.integers(5, 14), P=st.integers(3, 40))
def test_multi_metrics(seed, K, P):
    given_ = problem(seed, K, P)
    expected = oracles.multi_metrics(given_.w.numpy(), given_.D)
    ordered = np.sort(expected)
    assume(ordered[K // 2] - ordered[K // 2 - 1] > 1e-4 * ordered[-1])  # else rounding chooses
    result = given_.apply(MultiMetrics(keep_share=0.5))
    np.testing.assert_allclose(result.discrepancy, expected, rtol=1e-5)
    members = sorted(kept(result))  # which of two equal ones rounding decides
    np.testing.assert_allclose(np.sort(expected[members]), np.sort(expected)[: K // 2], rtol=1e-9)
    n = np.array(given_.n)[members]
    assert_step(given_, result, n / n.sum() @ given_.D[members])


def test_metrics_that_tell_nothing_are_left_out():
    assert whitened_scores(torch.ones(4, 3).double()).tolist() == [0] * 4
    assert whitened_scores(torch.ones(1, 3).double()).tolist() == [0]
    metrics = torch.tensor([[1.0, 5, 0], [1, 6, 0], [1, 5.5, 0], [1, 9, 0]], dtype=torch.float64)
    assert whitened_scores(metrics).argmax() == 3


@given(problem=problems)
def test_finetuning_and_sageflow(problem):
    tuned = problem.apply(Finetuning(refine=lambda params: 2 * params)).params
    torch.testing.assert_close(tuned, 2 * problem.apply(FedAvg()).params)
    result = problem.apply(Sageflow(evaluate=quality, entropy_threshold=0.8, loss_exponent=2))
    weights = []
    for d, n in zip(problem.D, problem.n, strict=True):
        entropy, loss = quality(problem.w + torch.from_numpy(d))
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


# --- ByzFL, where it has the rule


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


# --- what all rules have in common


def test_every_rule_is_tried():
    exported = {getattr(fdcr_fast, name) for name in fdcr_fast.__all__}
    rules = {x for x in exported if isinstance(x, type) and issubclass(x, AggregationRule)}
    assert rules - {AggregationRule, FedAvg, fdcr_fast.FDCR, fdcr_fast.CoalitionFDCR} == CLASSES


everyone = pytest.mark.parametrize("name", RULES)


# Sums over parameters are formed tile by tile, so that what depends on them is rounded as the tiles are.
ROUNDED = {"geometric median", "foolsgold", "flame", "fltrust"}


def same(result, other, exactly=True):
    assert torch.equal(result.kept, other.kept)
    assert torch.equal(result.labels, other.labels)
    if exactly:
        assert torch.equal(result.params, other.params)
        assert torch.equal(result.weights, other.weights)
    else:
        torch.testing.assert_close(other.weights, result.weights, rtol=1e-11, atol=0)
        torch.testing.assert_close(other.params, result.params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.discrepancy, result.discrepancy, rtol=1e-8, atol=1e-12, equal_nan=True)


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stores_and_tensors_give_the_same_bits_with_any_number_of_threads(name, dtype, tmp_path):
    given_ = problem(3, 9, 5000, dtype)
    expected, exactly = given_.apply(RULES[name]()), name not in ROUNDED
    same(expected, RULES[name]().aggregate(given_.w, given_.store()), exactly)
    with given_.store(tmp_path / "round.store") as store:
        same(expected, RULES[name]().aggregate(given_.w, store), exactly)
    strided = torch.full((5000, 27), torch.nan, dtype=dtype).t()
    strided[::3] = given_.updates
    same(expected, Problem(given_.w, strided[::3], given_.n).apply(RULES[name]()), exactly)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            again = given_.apply(RULES[name]())
            compiled = _native.module is not None  # PyTorch's own matrix products depend on the number of threads
            same(expected, again, exactly=compiled)
            if compiled:
                assert torch.equal(again.discrepancy.nan_to_num(), expected.discrepancy.nan_to_num())
    finally:
        torch.set_num_threads(before)


@everyone
def test_the_order_of_the_clients_does_not_matter(name):
    given_ = problem(4, 11, 200)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = Problem(given_.w, given_.updates[order], [given_.n[k] for k in order])
    result, other = given_.apply(RULES[name]()), shuffled.apply(RULES[name](), client_ids=order.tolist())
    torch.testing.assert_close(other.params, result.params, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.weights, result.weights[order], rtol=1e-6, atol=1e-12)
    assert kept(other) == kept(result)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("flame", "crfl", "multi-metrics", "sageflow")])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_step_grows_with_the_updates(name, scale):
    given_ = problem(5, 11, 200)
    result = given_.apply(RULES[name]())
    large = Problem(given_.w, given_.updates * scale, given_.n).apply(RULES[name]())
    torch.testing.assert_close(large.weights * (scale if name == "fltrust" else 1), result.weights, rtol=1e-6, atol=0)
    assert kept(large) == kept(result)


@everyone
@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("P", [1, 17])
def test_few_clients(name, K, P):
    given_ = problem(6, K, P)
    if NEEDS.get(name, 0) > K:
        with pytest.raises(ValueError, match=f"needs at least {NEEDS[name]} clients, got {K}"):
            given_.apply(RULES[name]())
        return
    result = given_.apply(RULES[name]())
    assert result.params.isfinite().all()
    assert result.kept.shape == result.weights.shape == (K,)


@everyone
def test_clients_that_send_what_cannot_be_used_stop_nobody(name):
    given_ = problem(7, 12, 30)
    usable = Problem(given_.w, given_.updates[:7], given_.n[:7])
    given_.updates[7:, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, 1e200])
    result = given_.apply(RULES[name]())
    assert list(result.rejected) == [7, 8, 9, 10, 11]
    assert result.params.isfinite().all()
    assert not result.kept[7:].any()
    assert (result.labels[7:] == -1).all()
    if name in ("median", "geometric median", "foolsgold", "fltrust", "multi-metrics", "flame"):
        torch.testing.assert_close(result.params, usable.apply(RULES[name]()).params)
    with pytest.raises(ValueError, match="client 7: the update is not finite"):
        given_.apply(RULES[name](), on_invalid="raise")
    given_.updates[:] = torch.nan
    with pytest.raises(ValueError, match="none of 12 clients can be used"):
        given_.apply(RULES[name]())
    with pytest.warns(UserWarning, match="none of 12 clients can be used"):
        assert torch.equal(given_.apply(RULES[name](), on_empty="keep").params, given_.w)


@everyone
def test_an_attack_of_any_size_is_survived(name):
    given_ = problem(8, 11, 30)
    given_.updates[0] = 1e100
    given_.updates[1] = torch.where(torch.arange(30) % 2 == 0, 1e-300, -1e-300)
    result = given_.apply(RULES[name]())
    assert result.params.isfinite().all()
    assert result.weights.isfinite().all()
    if name in ("median", "krum", "multi-krum", "bulyan", "geometric median", "fltrust", "flame", "dnc"):
        honest = np.linalg.norm(given_.D[2:], axis=1).max()
        assert (result.params - given_.w).norm() < 3 * honest
    bounded = given_.apply(dataclasses.replace(RULES[name](), norm_bound=5.0))
    assert "beyond 5 times the median" in bounded.rejected[0]


@everyone
def test_updates_of_zero(name):
    given_ = problem(9, 11, 30)
    given_.updates[3:5] = 0
    assert given_.apply(RULES[name]()).params.isfinite().all()
    given_.updates[:] = 0
    result = given_.apply(RULES[name]())
    assert result.params.isfinite().all()
    if name not in ("flame", "crfl", "finetuning"):
        assert torch.equal(result.params, given_.w)


@pytest.mark.parametrize(
    "name",
    [name for name in RULES if "max_weight_share" in {field.name for field in dataclasses.fields(RULES[name]())}],
)
def test_what_one_client_counts_for_is_limited(name):
    given_ = problem(12, 11, 30)
    given_.n[4] = 10**15
    free, limited = (given_.apply(dataclasses.replace(RULES[name](), max_weight_share=s)) for s in (None, 0.25))
    assert kept(free)
    if name == "fltrust":
        lengths = torch.from_numpy(np.linalg.norm(given_.D, axis=1))
        free, limited = (dataclasses.replace(r, weights=r.weights * lengths) for r in (free, limited))
    assert (limited.weights / limited.weights.sum()).max() <= max(0.25, 1 / len(kept(free))) + 1e-12


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (MultiKrum, {"num_byzantine": -1}),
        (MultiKrum, {"num_byzantine": 1.5}),
        (MultiKrum, {"num_byzantine": True}),
        (MultiKrum, {"num_selected": 0, "num_byzantine": 1}),
        (GeometricMedian, {"smoothing": 0}),
        (GeometricMedian, {"iterations": 0}),
        (GeometricMedian, {"tolerance": math.nan}),
        (RLR, {"threshold": -1}),
        (FoolsGold, {"params": slice(0, 9, 2)}),
        (DnC, {"iterations": 0, "num_byzantine": 1}),
        (DnC, {"sample": 0, "num_byzantine": 1}),
        (DnC, {"filter_fraction": 1.5, "num_byzantine": 1}),
        (CRFL, {"param_norm": 0}),
        (CRFL, {"noise": -1}),
        (FLAME, {"noise": math.inf}),
        (FLAME, {"norm_bound": 0.5}),
        (MultiMetrics, {"keep_share": 0}),
        (MultiMetrics, {"max_weight_share": 0}),
        (Sageflow, {"entropy_threshold": 0, "evaluate": quality}),
        (Sageflow, {"loss_exponent": math.nan, "evaluate": quality}),
    ],
)
def test_options_are_checked(rule, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        rule(**options)


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
