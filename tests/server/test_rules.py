from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transcription
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS
from fdcr_fast.rules.fdcr.discrepancy import SCORES
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.rules.result import Selection
from fdcr_fast.store.update_store import UpdateStore


@dataclasses.dataclass
class Round:
    w: torch.Tensor
    updates: torch.Tensor
    fishers: torch.Tensor
    n: list[int]

    def aggregate(self, rule, **options):
        return rule.aggregate(self.w, self.updates, self.fishers, self.n, **options)

    def store(self, tile=None, dtype=None):
        store = UpdateStore(len(self.w), len(self.n), dtype or self.updates.dtype, tile=tile)
        for update, fisher, n in zip(self.updates, self.fishers, self.n, strict=True):
            assert store.put(update, fisher, n)
        return store


def random_round(seed, K, P, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, 0.7, (K, 1))  # norms differ, but not beyond the norm bound
    fishers = rng.lognormal(0, 2, (K, P))
    fishers[:, 0] = 0  # so that none is constant in bfloat16
    return Round(
        torch.from_numpy(rng.normal(size=P)).to(dtype),
        torch.from_numpy(rng.normal(size=(K, P)) * scale).to(dtype),
        torch.from_numpy(fishers).to(dtype),
        rng.integers(1, 1000, K).tolist(),
    )


def transcribed(round_, **options):
    return transcription.fdcr(
        round_.w.double().tolist(),
        round_.updates.double().tolist(),
        round_.fishers.double().tolist(),
        round_.n,
        **options,
    )


def assert_is(result, expected):
    params, V, kept, labels, weights = expected
    # bfloat16 parameters are rounded once, at the end: compare with the rounded reference.
    reference = torch.from_numpy(params).to(result.params.dtype).double()
    difference = torch.linalg.vector_norm(result.params.double() - reference)
    assert difference <= {torch.bfloat16: 2**-8}.get(result.params.dtype, 1e-5) * torch.linalg.vector_norm(reference)
    np.testing.assert_allclose(result.discrepancy, V, rtol=1e-5)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-12)
    assert result.kept.tolist() == kept.tolist()
    assert result.labels.tolist() == labels.tolist()


def layouts(matrix):
    """The same matrix in other strides: transposed memory, and columns and rows inside a larger one."""
    rows, columns = matrix.shape
    padded = torch.full((2 * rows, columns + 3), torch.nan, dtype=matrix.dtype)
    padded[::2, 2:-1] = matrix
    return {"rows": matrix, "transposed": matrix.t().contiguous().t(), "offset": padded[::2, 2:-1]}


PROBLEMS = {"seed": st.integers(0, 2**32 - 1), "K": st.integers(3, 12), "P": st.integers(2, 40)}
OPTIONS = st.fixed_dictionaries(
    {
        "discrepancy": st.sampled_from(sorted(SCORES)),
        "cluster": st.sampled_from(["finch", "kmeans", None]),
        "partition": st.sampled_from(["first", "last", 0, 1, 5]),
        "rescale": st.booleans(),
        "importance": st.booleans(),
        "learning_rate": st.sampled_from([1.0, 0.01]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    **PROBLEMS,
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layout=st.sampled_from(["rows", "transposed", "offset"]),
)
def test_matrices_give_the_transcribed_formulas(seed, K, P, options, dtype, layout):
    problem = random_round(seed, K, P, dtype)
    expected = transcribed(problem, **options)
    problem.updates = layouts(problem.updates)[layout]
    problem.fishers = layouts(problem.fishers)[layout]
    result = problem.aggregate(FDCR(**options))
    assert result.params.dtype == dtype
    assert_is(result, expected)


@settings(max_examples=100, deadline=None)
@given(
    **PROBLEMS,
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    tile=st.sampled_from([None, 1, 3, 8, 1000]),
)
def test_stores_give_the_transcribed_formulas(seed, K, P, options, dtype, tile):
    problem = random_round(seed, K, P, dtype)
    result = FDCR(**options).aggregate(problem.w, problem.store(tile))
    assert_is(result, transcribed(problem, **options))


@settings(max_examples=30, deadline=None)
@given(**PROBLEMS)
def test_stored_precision_is_what_is_aggregated(seed, K, P):
    problem = random_round(seed, K, P)
    low = dataclasses.replace(
        problem, updates=problem.updates.bfloat16().float(), fishers=problem.fishers.bfloat16().float()
    )
    assert_is(FDCR().aggregate(problem.w, problem.store(dtype=torch.bfloat16)), transcribed(low))


@settings(max_examples=30, deadline=None)
@given(**PROBLEMS)
def test_mixed_precision(seed, K, P):
    problem = random_round(seed, K, P)
    problem.fishers = problem.fishers.double()
    problem.w = problem.w.bfloat16()
    assert_is(problem.aggregate(FDCR()), transcribed(problem))


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


def test_every_clustering_drops_an_outlying_group():
    problem = random_round(0, 10, 50)
    problem.updates = torch.nn.functional.normalize(problem.updates)
    problem.updates[:3] *= 20
    problem.n = [10] * 10
    for cluster in CLUSTERINGS:
        for discrepancy in SCORES:
            rule = FDCR(cluster=cluster, discrepancy=discrepancy, partition="last", importance=False)
            assert problem.aggregate(rule).kept.tolist() == [False] * 3 + [True] * 7


def test_dbscan_options_reach_it():
    problem = random_round(0, 10, 50)
    assert problem.aggregate(FDCR(cluster="dbscan", eps=100.0)).labels.max() == 0
    assert problem.aggregate(FDCR(cluster="dbscan", eps=1e-9)).labels.max() == 0  # all noise is one set
    assert problem.aggregate(FDCR(cluster="dbscan", eps=1e-9, min_samples=1)).labels.max() == 9


@settings(max_examples=40, deadline=None)
@given(**PROBLEMS, options=OPTIONS, random=st.randoms())
def test_the_order_of_clients_does_not_matter(seed, K, P, options, random):
    problem = random_round(seed, K, P)
    order = list(range(K))
    random.shuffle(order)
    result = problem.aggregate(FDCR(**options))
    permuted = Round(
        problem.w, problem.updates[order], problem.fishers[order], [problem.n[k] for k in order]
    ).aggregate(FDCR(**options))
    assert torch.equal(permuted.kept, result.kept[order])
    assert torch.equal(permuted.labels, result.labels[order])
    torch.testing.assert_close(permuted.discrepancy, result.discrepancy[order])
    torch.testing.assert_close(permuted.params, result.params)


@settings(max_examples=40, deadline=None)
@given(**PROBLEMS, options=OPTIONS)
def test_sign_and_learning_rate_decide_nothing(seed, K, P, options):
    problem = random_round(seed, K, P, torch.float64)
    result = problem.aggregate(FDCR(**options))
    negated = dataclasses.replace(problem, updates=-problem.updates).aggregate(FDCR(**options))
    assert torch.equal(negated.kept, result.kept)
    torch.testing.assert_close(negated.params - problem.w, problem.w - result.params)
    rated = problem.aggregate(FDCR(**{**options, "learning_rate": options["learning_rate"] / 8}))
    assert torch.equal(rated.kept, result.kept)
    assert torch.equal(rated.params, result.params)
    factor = 64 if options["discrepancy"] == "mse" else 8
    torch.testing.assert_close(rated.discrepancy, factor * result.discrepancy)


@settings(max_examples=20, deadline=None)
@given(**PROBLEMS)
def test_importance_ignores_scale_and_offset_of_the_fisher(seed, K, P):
    problem = random_round(seed, K, P, torch.float64)
    result = problem.aggregate(FDCR())
    other = dataclasses.replace(problem, fishers=problem.fishers * 1e-30 + 3e-30).aggregate(FDCR())
    torch.testing.assert_close(other.discrepancy, result.discrepancy)
    torch.testing.assert_close(other.params, result.params)


def test_rescaling_lies_between_one_and_its_limit():
    problem = random_round(1, 1, 1000, torch.float64)
    factor = (problem.aggregate(FDCR()).params - problem.w) / problem.updates[0]
    assert 1 - 1e-9 <= factor.min() < 1 + 1e-6
    assert 2 * np.e / (1 + np.e) - 1e-6 < factor.max() <= 2 * np.e / (1 + np.e) + 1e-9


def test_one_client_is_kept():
    for cluster in (*CLUSTERINGS, None):
        result = random_round(0, 1, 9).aggregate(FDCR(cluster=cluster))
        assert result.kept.tolist() == [True]
        assert result.weights.tolist() == [1.0]
        assert result.labels.tolist() == [0]
        assert result.discrepancy.item() < 1e-25  # 0 but for rounding


@pytest.mark.parametrize("cluster", CLUSTERINGS)
def test_one_client_is_kept_where_all_others_are_rejected(cluster):
    problem = random_round(4, 3, 10)
    problem.fishers[[0, 2]] = 1.0
    rule = FDCR(cluster=cluster)
    for result in (problem.aggregate(rule), rule.aggregate(problem.w, problem.store())):
        assert result.kept_clients == [1]
        assert result.labels.tolist() == [-1, 0, -1]


def test_two_clients_of_one_size_have_the_same_score():
    problem = random_round(0, 2, 9)
    problem.n = [5, 5]
    for cluster in (*CLUSTERINGS, None):
        result = problem.aggregate(FDCR(cluster=cluster))
        assert result.kept.tolist() == [True, True]
    problem.n = [5, 6]
    assert problem.aggregate(FDCR(cluster="kmeans")).kept.tolist() == [False, True]
    assert problem.aggregate(FDCR(cluster="finch")).kept.tolist() == [True, True]


def test_identical_clients_are_all_kept():
    problem = random_round(0, 1, 99)
    same = Round(problem.w, problem.updates.repeat(7, 1), problem.fishers.repeat(7, 1), [1, 2, 3, 4, 5, 6, 7])
    for cluster in CLUSTERINGS:
        assert same.aggregate(FDCR(cluster=cluster)).kept.all()


def test_inputs_stay_as_they_are():
    problem = random_round(0, 5, 20)
    before = [t.clone() for t in (problem.w, problem.updates, problem.fishers)]
    for rule in (FDCR(), FedAvg()):
        problem.aggregate(rule).params.add_(1)
        after = (problem.w, problem.updates, problem.fishers)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_are_not_tracked():
    problem = random_round(0, 5, 20)
    for tensor in (problem.w, problem.updates, problem.fishers):
        tensor.requires_grad_()
    assert not problem.aggregate(FDCR()).params.requires_grad


# --- bad clients --------------------------------------------------------------------------------------------

BAD_CLIENTS = {
    "NaN update": (lambda r: r.updates[2].__setitem__(5, torch.nan), "update is not finite"),
    "infinite update": (lambda r: r.updates[2].__setitem__(5, -torch.inf), "update is not finite"),
    "NaN Fisher": (lambda r: r.fishers[2].__setitem__(5, torch.nan), "Fisher is not finite"),
    "infinite Fisher": (lambda r: r.fishers[2].__setitem__(5, torch.inf), "Fisher is not finite"),
    "negative Fisher": (
        lambda r: r.fishers[2].__setitem__(5, -0.5),
        "negative entries, the smallest is -0.5",
    ),
    "constant Fisher": (lambda r: r.fishers[2].fill_(0.25), "constant (every entry is 0.25)"),
    "zero Fisher": (lambda r: r.fishers[2].zero_(), "constant (every entry is 0)"),
    "no samples": (lambda r: r.n.__setitem__(2, 0), "sample count must be positive and finite, got 0"),
    "negative samples": (lambda r: r.n.__setitem__(2, -3), "got -3"),
    "NaN samples": (lambda r: r.n.__setitem__(2, float("nan")), "got nan"),
    "infinite samples": (lambda r: r.n.__setitem__(2, float("inf")), "got inf"),
    "huge update": (lambda r: r.updates[2].mul_(1e30), "beyond 100 times the median"),
    "overflowing norm": (lambda r: r.updates[2].fill_(1.5e153), "too large to be squared"),
}


@pytest.mark.parametrize("case", BAD_CLIENTS)
@pytest.mark.parametrize("stored", [False, True])
def test_a_bad_client_is_rejected_and_the_others_aggregated(case, stored):
    spoil, reason = BAD_CLIENTS[case]
    problem = random_round(3, 8, 40, torch.float64)
    others = [k for k in range(8) if k != 2]
    expected = Round(
        problem.w,
        problem.updates[others].clone(),
        problem.fishers[others].clone(),
        [problem.n[k] for k in others],
    ).aggregate(FDCR())
    spoil(problem)
    if stored:
        store = UpdateStore(40, 8, torch.float64, tile=16)
        accepted = [store.put(*row) for row in zip(problem.updates, problem.fishers, problem.n, strict=True)]
        # What depends on the rule or on the other clients is found at aggregation.
        assert accepted[2] == (case in ("constant Fisher", "zero Fisher", "huge update"))
        result = FDCR().aggregate(problem.w, store)
    else:
        result = problem.aggregate(FDCR())
    assert list(result.rejected) == [2]
    assert reason in result.rejected[2]
    rows = [row for row, client in enumerate(result.clients) if client != 2]
    torch.testing.assert_close(result.params, expected.params)
    torch.testing.assert_close(result.weights[rows], expected.weights)
    torch.testing.assert_close(result.discrepancy[rows], expected.discrepancy)
    assert torch.equal(result.kept[rows], expected.kept)
    assert torch.equal(result.labels[rows], expected.labels)
    if 2 in result.clients:
        row = result.clients.index(2)
        assert not result.kept[row]
        assert result.weights[row] == 0
        assert result.labels[row] == -1
        assert result.discrepancy[row].isnan()


def test_fishers_are_not_judged_by_rules_that_do_not_take_them():
    problem = random_round(0, 6, 20)
    problem.fishers[1] = 1.0
    problem.fishers[2] = torch.nan
    for rule in (FedAvg(), FDCR(importance=False, rescale=False)):
        assert problem.aggregate(rule).rejected == {}
    assert list(problem.aggregate(FDCR(importance=False)).rejected) == [1, 2]
    assert list(problem.aggregate(FDCR(rescale=False)).rejected) == [1, 2]


@pytest.mark.parametrize("K", [1, 4])
def test_nobody_left(K):
    problem = random_round(0, K, 20)
    problem.fishers[:] = 1.0
    store = UpdateStore(20, K)
    for k in range(K):
        store.put(problem.updates[k] * torch.nan, problem.fishers[k], 1)
    for call in (lambda **o: problem.aggregate(FDCR(), **o), lambda **o: FDCR().aggregate(problem.w, store, **o)):
        with pytest.raises(ValueError, match=f"none of {K} clients can be used: client 0: the "):
            call()
    with pytest.warns(UserWarning, match="the global parameters stay as they are"):
        kept = problem.aggregate(FDCR(), on_empty="keep"), FDCR().aggregate(problem.w, store, on_empty="keep")
    for result, rows in zip(kept, (K, 0), strict=True):
        assert torch.equal(result.params, problem.w)
        assert result.params.data_ptr() != problem.w.data_ptr()
        assert len(result.rejected) == K
        assert result.kept.tolist() == [False] * rows
        assert result.weights.tolist() == [0.0] * rows
        assert result.labels.tolist() == [-1] * rows
        assert len(result.discrepancy) == rows


def test_one_absurd_update_is_rejected_unless_the_bare_rule_is_asked_for():
    problem = random_round(5, 7, 30)
    problem.updates[4] = 1e38
    result = problem.aggregate(FDCR())
    assert list(result.rejected) == [4]
    assert "beyond 100 times the median" in result.rejected[4]
    bare = problem.aggregate(FDCR(norm_bound=None))
    assert bare.rejected == {}
    assert bare.kept[4]  # FINCH never isolates a single value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_side_by_side_from_1e38_to_denormal(dtype):
    problem = random_round(2, 6, 30, torch.float64)
    problem.updates *= torch.tensor([1e-3, 1e38, 1e-3, 1e36, 1e-42, 1e-3]).double()[:, None]
    problem.updates, problem.fishers = problem.updates.clamp(-3e38, 3e38).to(dtype), problem.fishers.to(dtype)
    bare = problem.aggregate(FDCR(norm_bound=None, cluster="kmeans"))
    assert_is(bare, transcribed(problem, cluster="kmeans"))
    result = problem.aggregate(FDCR())
    assert list(result.rejected) == [1, 3]
    assert result.params.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormal_updates_and_fishers(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 8 if dtype == torch.float32 else 1e-150
    problem = random_round(2, 6, 30, torch.float64)
    problem.w *= 0
    problem.updates, problem.fishers = (problem.updates * tiny).to(dtype), (problem.fishers * tiny).to(dtype)
    assert_is(problem.aggregate(FDCR()), transcribed(problem))


def test_the_norm_bound_is_relative_to_the_lower_median():
    updates = torch.diag(torch.tensor([1.0, 2.0, 3.0, 20.5]))
    count = [1] * 4

    def rejected(norm_bound):
        return list(FedAvg(norm_bound=norm_bound).aggregate(torch.zeros(4), updates, None, count).rejected)

    assert rejected(None) == rejected(10.25) == []
    assert rejected(10.2) == [3]
    assert rejected(1) == [2, 3]


def test_a_rejected_client_does_not_move_the_median():
    updates = torch.diag(torch.tensor([1.0, 1.0, 50.0, torch.nan, torch.nan, torch.nan]))
    result = FedAvg(norm_bound=10).aggregate(torch.zeros(6), updates, None, [1] * 6)
    assert list(result.rejected) == [2, 3, 4, 5]


# --- bad calls ----------------------------------------------------------------------------------------------


def good():
    return {
        "global_params": torch.zeros(4),
        "updates": torch.rand(3, 4),
        "fishers": torch.rand(3, 4),
        "num_samples": [1, 2, 3],
    }


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"updates": torch.rand(12)}, ValueError, r"expected updates \[K, P\], got shape \[12\]"),
        ({"updates": torch.rand(1, 3, 4)}, ValueError, r"expected updates \[K, P\], got shape \[1, 3, 4\]"),
        (
            {"updates": torch.ones(3, 4, dtype=torch.int64)},
            TypeError,
            "floating-point updates .* got torch.int64",
        ),
        ({"updates": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, "floating-point updates"),
        ({"updates": "abc"}, TypeError, r"expected updates \[K, P\], K vectors or an UpdateStore, got str"),
        ({"updates": [torch.rand(4)]}, ValueError, "expected fishers of 1 clients like updates, got 3"),
        (
            {"global_params": {"w": torch.zeros(4)}},
            TypeError,
            r"\[P\] to be a torch.Tensor, got dict; .*aggregate_state_dicts",
        ),
        ({"fishers": None, "num_samples": None}, ValueError, "fishers must be given"),
        ({"on_empty": "ignore"}, ValueError, "on_empty must be one of"),
        (
            {"updates": torch.rand(0, 4), "fishers": torch.rand(0, 4), "num_samples": []},
            ValueError,
            "at least one",
        ),
        ({"updates": torch.rand(3, 0), "fishers": torch.rand(3, 0)}, ValueError, "at least one"),
        ({"fishers": torch.rand(2, 4)}, ValueError, r"expected fishers \[3, 4\] like updates, got \[2, 4\]"),
        ({"fishers": torch.rand(3, 5)}, ValueError, r"expected fishers \[3, 4\] like updates, got \[3, 5\]"),
        (
            {"fishers": torch.ones(3, 4, dtype=torch.bool)},
            TypeError,
            "floating-point fishers .* got torch.bool",
        ),
        (
            {"fishers": torch.rand(3, 4, device="meta")},
            ValueError,
            "fishers on the device of the updates, cpu, got meta",
        ),
        ({"fishers": None}, ValueError, "fishers must be given"),
        ({"num_samples": [1, 2]}, ValueError, r"expected num_samples \[3\], one per client, got shape \[2\]"),
        ({"num_samples": [[1, 2, 3]]}, ValueError, r"num_samples \[3\], one per client, got shape \[1, 3\]"),
        ({"num_samples": ["a", "b", "c"]}, TypeError, "num_samples to be 3 numbers"),
        ({"num_samples": None}, TypeError, "num_samples to be 3 numbers, got None"),
        (
            {"global_params": torch.zeros(5)},
            ValueError,
            r"expected global_params \[4\] like the updates, got \[5\]",
        ),
        (
            {"global_params": torch.zeros(2, 2)},
            ValueError,
            r"expected global_params \[P\], got shape \[2, 2\]",
        ),
        ({"global_params": torch.zeros(4, dtype=torch.int32)}, TypeError, "floating-point global_params"),
        (
            {"global_params": torch.zeros(4, device="meta")},
            ValueError,
            "global_params on the device of the updates",
        ),
        ({"global_params": torch.tensor([0, torch.nan, 0, 0])}, ValueError, "global_params are not finite"),
        ({"global_params": torch.tensor([0, torch.inf, 0, 0])}, ValueError, "global_params are not finite"),
        ({"client_ids": ["a", "b"]}, ValueError, "expected 3 different client ids"),
        ({"client_ids": ["a", "b", "a"]}, ValueError, "expected 3 different client ids"),
    ],
)
def test_a_bad_call_says_what_was_expected(wrong, error, message):
    with pytest.raises(error, match=message):
        FDCR().aggregate(**{**good(), **wrong})


def test_bad_calls_with_stores():
    store = UpdateStore(4, 2)
    with pytest.raises(ValueError, match="empty store"):
        FDCR().aggregate(torch.zeros(4), store)
    store.put(torch.rand(4), torch.rand(4), 1)
    with pytest.raises(TypeError, match="give the store alone"):
        FDCR().aggregate(torch.zeros(4), store, None, [1])
    with pytest.raises(ValueError, match=r"expected global_params \[4\]"):
        FDCR().aggregate(torch.zeros(3), store)
    without = UpdateStore(4, 2, with_fishers=False)
    without.put(torch.rand(4), None, 1)
    assert FedAvg().aggregate(torch.zeros(4), without).kept.all()
    with pytest.raises(ValueError, match="fishers must be given"):
        FDCR().aggregate(torch.zeros(4), without)


@pytest.mark.parametrize(
    "options",
    [
        {"discrepancy": "l1"},
        {"cluster": "gmm"},
        {"partition": "middle"},
        {"partition": -1},
        {"norm_bound": 0.5},
        {"norm_bound": -1.0},
        {"norm_bound": float("nan")},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"eps": -1.0},
        {"min_samples": 0},
    ],
)
def test_options_are_checked_when_the_rule_is_made(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FDCR(**options)


def test_rules_are_values():
    assert FDCR() == FDCR(discrepancy="mse", cluster="finch", partition="first", rescale=True)
    assert "partition='last'" in repr(FDCR(partition="last"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        FDCR().rescale = False


def test_numbers_of_samples_in_any_form():
    inputs = good()
    counts = [2.5, 1.0, 4.0]
    expected = FDCR().aggregate(**{**inputs, "num_samples": counts}).params
    for form in (
        tuple(counts),
        np.array(counts, dtype=np.float32),
        torch.tensor(counts),
        [torch.tensor(n) for n in counts],
    ):
        assert torch.equal(FDCR().aggregate(**{**inputs, "num_samples": form}).params, expected)


def test_client_ids_name_rows_and_reasons():
    inputs = good()
    inputs["updates"][1] = torch.nan
    result = FDCR().aggregate(**inputs, client_ids=["a", "b", "c"])
    assert result.clients == ("a", "b", "c")
    assert list(result.rejected) == ["b"]


def test_a_rule_of_ones_own_needs_only_select():
    @dataclasses.dataclass(frozen=True)
    class DropEven(AggregationRule):
        def select(self, clients):
            return Selection(torch.tensor([client % 2 == 1 for client in clients.clients]))

    problem = random_round(0, 5, 10)
    problem.updates[3] = torch.nan
    result = DropEven().aggregate(problem.w, problem.updates, None, problem.n)
    assert result.kept.tolist() == [False, True, False, False, False]
    assert result.labels.tolist() == [1, 0, 1, -1, 1]
    torch.testing.assert_close(result.params, problem.w + problem.updates[1])
    nobody = DropEven().aggregate(problem.w, problem.updates[:1], None, [1])
    assert torch.equal(nobody.params, problem.w)
