"""FDCR reads the clients once where its guess of who is kept holds, and the result never depends on the guess."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import CRFL, FDCR, RLR, FedAvg, Finetuning, Selection, UpdateStore, ops
from fdcr_fast.round import readings
from fdcr_fast.round.tiles import MatrixTiles
from fdcr_fast.rules.foreseen import MeanRule
from tests.support.fdcr_rounds import P, attacked

# What they make of the mean may depend on all parameters.
MEAN_RULES = [
    FedAvg,
    partial(CRFL, noise=0.5),
    partial(RLR, threshold=9),
    partial(Finetuning, refine=lambda params: 2 * params),
]


@pytest.fixture
def reads(monkeypatch):
    """What was read, in order: (kind, single)."""
    seen = []

    def count(kind, read):
        def counted(*args, **options):
            seen.append((kind, options["single"]))
            return read(*args, **options)

        return counted

    for kind in ("scores", "mean", "scores_and_mean", "norms_and_mean"):
        monkeypatch.setattr(readings, kind, count(kind, getattr(readings, kind)))
    return seen


def stored(updates, fishers, n):
    store = UpdateStore(updates.shape[1], len(n), updates.dtype)
    for update, fisher, count in zip(updates, fishers, n.tolist(), strict=True):
        assert store.put(update, fisher, count)
    return store


def in_float64(w, updates, fishers, n, kept):
    D, F = updates.double(), fishers.double()
    low, high = F.aminmax(dim=1, keepdim=True)
    importance = (F - low) / (high - low)
    alpha = n.double() / n.sum()
    V = (alpha @ (importance * D) - importance * D).square().mean(1)
    weights = torch.where(kept, n, 0).double() / n[kept].sum()
    return V, weights @ (2 * importance.sigmoid() * D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["store", "matrices"])
def test_one_reading_where_the_guess_holds(reads, dtype, source):
    w, updates, fishers, n = attacked(dtype=dtype)
    arguments = (stored(updates, fishers, n),) if source == "store" else (updates, fishers, n)
    result = FDCR(cluster="kmeans").aggregate(w, *arguments)
    assert reads == [("scores_and_mean", True)]
    assert result.kept.tolist() == [False] * 4 + [True] * 16
    V, step = in_float64(w, updates, fishers, n, result.kept)
    np.testing.assert_allclose(result.discrepancy, V, rtol=1e-6)
    assert (result.params - w - step).norm() < 1e-6 * w.norm()


@settings(max_examples=12)
@given(seed=st.integers(0, 1000), wrong=st.integers(0, 2**20 - 1), rescale=st.booleans(), importance=st.booleans())
def test_the_result_has_the_same_bits_whatever_was_guessed(seed, wrong, rescale, importance):
    w, updates, fishers, n = attacked(seed=seed)
    rule = FDCR(cluster="kmeans", rescale=rescale, importance=importance)
    right = rule.aggregate(w, updates, fishers, n)
    guess = torch.tensor([wrong >> k & 1 for k in range(20)], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "sampled_scores", lambda *_, **__: readings.Scores(guess, guess, torch.ones(())))
        other = rule.aggregate(w, updates, fishers, n)
    assert torch.equal(other.params, right.params)
    assert torch.equal(other.discrepancy, right.discrepancy)
    assert torch.equal(other.kept, right.kept)


def test_a_wrong_guess_costs_one_more_reading(reads, monkeypatch):
    w, updates, fishers, n = attacked()
    monkeypatch.setattr(
        readings,
        "sampled_scores",
        lambda *_, **__: readings.Scores(torch.arange(20.0).double(), torch.ones(20).double(), torch.ones(1).double()),
    )
    FDCR(cluster="kmeans").aggregate(w, updates, fishers, n)
    assert reads == [("scores_and_mean", True), ("mean", True)]


def test_nobody_is_guessed_where_nobody_can_be_dropped(reads, monkeypatch):
    w, updates, fishers, n = attacked()
    store = stored(updates, fishers, n)  # which knows the norms
    monkeypatch.setattr(readings, "sampled_scores", None)
    FDCR(cluster=None).aggregate(w, store)
    assert reads == [("scores_and_mean", True)]


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
def test_clients_that_nearly_agree_are_scored_in_float64(reads, noise):
    w, updates, fishers, n = attacked(attackers=0)
    updates = updates[:1] * (1 + noise * torch.randn(updates.shape, generator=torch.Generator().manual_seed(1)))
    fishers = fishers[:1] * (1 + noise * torch.rand(fishers.shape, generator=torch.Generator().manual_seed(2)))
    result = FDCR(cluster="kmeans").aggregate(w, updates, fishers, n)
    assert reads[0] == ("scores_and_mean", True)
    assert ("scores_and_mean", False) in reads
    V, _ = in_float64(w, updates, fishers, n, result.kept)
    np.testing.assert_allclose(result.discrepancy, V, rtol=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda u, f: (u * 1e-20, f),
        lambda u, f: (u * 1e37, f),
        lambda u, f: (u, f * 1e-38),
        lambda u, f: (torch.cat([u[:1] * 1e38, u[1:]]), f),
        lambda u, f: (u.double(), f),
    ],
)
def test_sizes_near_the_limits_of_float32_are_left_to_float64(reads, spoil):
    w, updates, fishers, n = attacked()
    updates, fishers = spoil(updates, fishers)
    result = FDCR(cluster="kmeans", norm_bound=None).aggregate(w, updates, fishers, n)
    assert not any(single for _, single in reads)
    V, _ = in_float64(w, updates, fishers, n, result.kept)
    np.testing.assert_allclose(result.discrepancy, V, rtol=1e-6)
    assert result.params.isfinite().all()
    assert result.discrepancy.isfinite().all()


def test_two_clients_of_one_size_have_the_same_score_in_large_rounds_too():
    w, updates, fishers, _ = attacked(K=2, attackers=0)
    assert FDCR(cluster="kmeans").aggregate(w, updates, fishers, [5, 5]).kept.all()


@pytest.mark.parametrize(
    ("T", "L", "P"),
    [(100, 16, 1600), (700, 16, 11_190), (1, 40_000, 40_000), (1, 7, 7), (3, 5000, 15_000), (40, 5000, 199_000)],
)
def test_samples_are_spread_over_the_parameters(T, L, P):
    numbers = torch.arange(T * L, dtype=torch.float64).view(T, 1, L).repeat(1, 2, 1)
    spans = list(readings._sample(MatrixTiles(numbers, numbers + 0.5, P)))
    seen = []
    for span in spans:
        assert torch.equal(span.fishers, span.updates + 0.5)
        assert (span.updates.shape[0] - 1) * span.updates.shape[2] < span.num_params
        assert span.updates.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
        seen += span.updates[:, 1].flatten()[: span.num_params].tolist()
    assert len(seen) == len(set(seen))
    assert max(seen) < P
    assert min(P, 4096) / 2 <= len(seen) < 2 * max(4096, P // 64)
    for part in range(4):
        assert any(part * P / 4 <= number < (part + 1) * P / 4 for number in seen)


def same_result(a, b):
    assert torch.equal(a.params, b.params)
    assert torch.equal(a.kept, b.kept)
    assert torch.equal(a.discrepancy.nan_to_num(-1), b.discrepancy.nan_to_num(-1))
    assert a.rejected == b.rejected


@pytest.fixture
def norm_readings(monkeypatch):
    """How many parameters each separate reading of the clients' norms took."""
    seen = []

    def counted(updates, num_params):
        if updates.shape[1] > 1:  # else it is that of a vector
            seen.append(num_params)
        return norms(updates, num_params)

    norms = ops.squared_norm
    monkeypatch.setattr(ops, "squared_norm", counted)
    return seen


def test_norms_of_matrices_take_no_reading_of_their_own(reads, norm_readings):
    w, updates, fishers, n = attacked()
    FDCR(cluster="kmeans").aggregate(w, updates, fishers, n)
    assert reads == [("scores_and_mean", True)]
    assert P not in norm_readings


@pytest.mark.parametrize("options", [{}, {"norm_bound": 50.0}, {"max_weight_share": 0.06}])
@pytest.mark.parametrize("make", MEAN_RULES)
@pytest.mark.parametrize("size", [10, P])
def test_the_mean_and_norms_of_matrices_take_one_reading(reads, norm_readings, make, options, size):
    w, updates, _, n = attacked()
    w, updates = w[:size], updates[:, :size].contiguous()
    store = UpdateStore(size, len(updates), with_fishers=False)
    for update, count in zip(updates, n, strict=True):
        store.put(update, None, count)
    expected = make(**options).aggregate(w, store)
    reads.clear()
    result = make(**options).aggregate(w, updates, None, n)
    assert [kind for kind, _ in reads] == ["norms_and_mean"]
    assert size not in norm_readings
    same_result(result, expected)
    assert torch.equal(result.weights, expected.weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e38])
@pytest.mark.parametrize("make", MEAN_RULES)
@pytest.mark.parametrize("size", [10, P])
def test_whoever_is_found_in_the_reading_for_the_mean_is_rejected(make, value, size):
    w, updates, _, n = attacked()
    w, updates = w[:size], updates[:, :size].clone()
    updates[5, 7] = value
    result = make(norm_bound=100.0).aggregate(w, updates, None, n)
    assert list(result.rejected) == [5]
    others = [k for k in range(len(updates)) if k != 5]
    expected = make().aggregate(w, updates[others], None, [n[k] for k in others])
    torch.testing.assert_close(result.params, expected.params)


@pytest.mark.parametrize("base", [FedAvg, MeanRule])
def test_a_rule_that_extends_the_mean_may_look_at_norms(base):
    @dataclass(frozen=True, kw_only=True)
    class DropsTheLongest(base):
        def select(self, clients):
            return Selection(clients.squared_norm < clients.squared_norm.max())

    w, updates, _, n = attacked()
    result = DropsTheLongest().aggregate(w, updates, None, n)
    longest = updates.norm(dim=1).argmax()
    assert result.kept.tolist() == [k != longest for k in range(len(updates))]
    expected = w.double() + result.weights @ updates.double()
    assert result.weights[longest] == 0
    assert (result.params - expected).norm() < 1e-6 * expected.norm()
    assert FedAvg(clip="median").aggregate(w, updates, None, n).weights.sum() < 1


def norms_of(clients):
    return clients.squared_norm.sqrt()


class Combines(MeanRule):
    def combine(self, global_params, clients, weights):
        return 7 - super().combine(global_params, clients, weights)


class Mixed:
    def combine(self, global_params, clients, weights):
        return global_params * 3


class MixedIn(Mixed, MeanRule):
    pass


class Rescales(MeanRule):
    rescale = True


class Clips(MeanRule):
    def weights(self, clients, kept):
        norms = norms_of(clients)
        return super().weights(clients, kept) * (norms.median() / norms).clamp(max=1)


class SharesByNorm(MeanRule):
    def shares(self, clients, chosen):
        return torch.where(chosen, 1 / norms_of(clients), 0.0)


class ClipsToo(FedAvg):
    def weights(self, clients, kept):
        return super().weights(clients, kept) / norms_of(clients)


class SaysSo(Clips):
    @property
    def needs_norms(self):
        return True


class Equal(MeanRule):
    def shares(self, clients, chosen):
        return chosen / chosen.double().sum()


class Halves(MeanRule):
    def of_mean(self, global_params, clients, mean):
        return mean.div_(2)


EXTENDED = [Combines, MixedIn, Rescales, Clips, SharesByNorm, ClipsToo, SaysSo, Equal, Halves]


@pytest.mark.parametrize("rule", EXTENDED)
def test_whatever_extends_the_mean_is_the_same_from_tensors_and_from_a_store(rule):
    w, updates, fishers, n = attacked()
    expected = rule().aggregate(w, stored(updates, fishers, n))
    result = rule().aggregate(w, updates, fishers, n)
    assert result.params.isfinite().all()
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.params, expected.params)
    assert not torch.allclose(result.params, FedAvg().aggregate(w, updates, None, n).params)


def test_what_needs_no_norms_is_read_once(reads):
    w, updates, _, n = attacked()
    for rule in (Halves(), *(make() for make in MEAN_RULES)):
        rule.aggregate(w, updates, None, n)
        assert [kind for kind, _ in reads] == ["norms_and_mean"]
        reads.clear()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value):
    class Careless(MeanRule):
        def weights(self, clients, kept):
            return super().weights(clients, kept) * value

    w, updates, fishers, n = attacked()
    for round in ((updates, fishers, n), (stored(updates, fishers, n),)):
        with pytest.raises(ValueError, match="Careless must return finite weights, it returned"):
            Careless().aggregate(w, *round)


def guess_norms(monkeypatch, square):
    """Make all squared norms seem to be this one."""
    right = readings.sampled_scores

    def sampled_scores(*arguments, **options):
        scores = right(*arguments, **options)
        return scores._replace(squared_norm=torch.full_like(scores.squared_norm, square))

    monkeypatch.setattr(readings, "sampled_scores", sampled_scores)


@pytest.mark.parametrize("guess", [0.0, 1e-40, 1e40, float("nan"), float("inf")])
def test_a_wrong_guess_of_norms_changes_nothing(monkeypatch, guess):
    w, updates, fishers, n = attacked()
    expected = FDCR().aggregate(w, updates, fishers, n)
    guess_norms(monkeypatch, guess)
    same_result(FDCR().aggregate(w, updates, fishers, n), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38])
@pytest.mark.parametrize("column", [0, 77, P - 1])
def test_what_one_entry_hides_is_found_without_a_reading_of_its_own(monkeypatch, value, column):
    w, updates, fishers, n = attacked()
    updates[5, column] = value
    result = FDCR().aggregate(w, updates, fishers, n)
    assert list(result.rejected) == [5]
    guess_norms(monkeypatch, torch.nan)
    same_result(result, FDCR().aggregate(w, updates, fishers, n))


@pytest.mark.parametrize("factor", [1 - 1e-7, 1.0, 1 + 1e-7])
def test_norms_at_the_bound_are_judged_by_exact_norms(monkeypatch, factor):
    w, updates, fishers, n = attacked(attackers=0)
    norms = updates.double().norm(dim=1)
    median = norms[1:].sort().values[9]  # the lower median of all: row 0 is the longest
    updates[0] *= float(2 * median * factor / norms[0])
    result = FDCR(norm_bound=2.0).aggregate(w, updates, fishers, n)
    guess_norms(monkeypatch, torch.nan)
    same_result(result, FDCR(norm_bound=2.0).aggregate(w, updates, fishers, n))


@pytest.mark.parametrize("rule", [FDCR(), FedAvg(norm_bound=100.0)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-25])
def test_norms_that_float32_loses_still_set_the_median(rule, size):
    generator = torch.Generator().manual_seed(0)
    updates = size * torch.randn(6, 20_000, generator=generator)
    updates[5] = 1e-2 * torch.randn(20_000, generator=generator)
    fishers = torch.rand(6, 20_000, generator=generator) if rule.needs_fishers else None
    result = rule.aggregate(torch.zeros(20_000), updates, fishers, [10] * 6)
    assert list(result.rejected) == [5]


def test_clients_that_send_nothing_new_cost_no_reading(reads):
    w, updates, fishers, n = attacked(attackers=0)
    updates[3] = 0
    FDCR(cluster="kmeans").aggregate(w, updates, fishers, n)
    assert [kind for kind, _ in reads].count("scores_and_mean") == 1
