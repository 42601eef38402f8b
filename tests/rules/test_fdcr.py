"""FDCR against the transcribed formulas, and what must not change its decisions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import ParamGroups, ops
from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS
from fdcr_fast.rules.fdcr.discrepancy import OF_DIRECTIONS, SCORES
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from tests.support.fdcr_rounds import Round, assert_is, random_round, transcribed
from tests.support.sizes import sizes


def layouts(matrix):
    """The same matrix in other strides: transposed memory, and columns and rows inside a larger one."""
    rows, columns = matrix.shape
    padded = torch.full((2 * rows, columns + 3), torch.nan, dtype=matrix.dtype)
    padded[::2, 2:-1] = matrix
    return {"rows": matrix, "transposed": matrix.t().contiguous().t(), "offset": padded[::2, 2:-1]}


PROBLEMS = {"seed": st.integers(0, 2**32 - 1), "K": st.integers(3, 12), "P": sizes(2, 40)}
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


def test_every_clustering_drops_an_outlying_group():
    problem = random_round(0, 10, 50)
    problem.updates = torch.nn.functional.normalize(problem.updates)
    problem.updates[:3] *= 20
    problem.n = [10] * 10
    for cluster in CLUSTERINGS:
        for discrepancy in sorted(SCORES.keys() - OF_DIRECTIONS):  # the group stands out by its lengths
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
    # Products in float32 give each of them to 1e-6.
    tolerance = {"rtol": 2e-6, "atol": 0} if P >= ops.STRETCH else {}
    torch.testing.assert_close(permuted.discrepancy, result.discrepancy[order], **tolerance)
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
    factor = {"mse": 64, "l2": 8, "cosine": 1}[options["discrepancy"]]
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


GROUPS = ParamGroups((slice(20, 27),), (slice(2, 9), slice(11, 14)))
COMPARED = [
    ("head", [*range(20, 27)]),
    ("features", [*range(2, 9), *range(11, 14)]),
    ([(25, 28), (0, 4)], [*range(4), *range(25, 28)]),
    ((slice(24, None), slice(3)), [*range(3), *range(24, 30)]),
]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    K=st.integers(3, 9),
    options=OPTIONS,
    compared=st.sampled_from(COMPARED),
    rejected=st.booleans(),
    stored=st.booleans(),
)
def test_some_of_the_parameters_are_compared_and_all_are_averaged(seed, K, options, compared, rejected, stored):
    parameters, columns = compared
    problem = random_round(seed, K, 30, torch.float64)
    expected = transcribed(problem, compared=columns, **options)
    rule = FDCR(parameters=parameters, groups=GROUPS, **options)
    if rejected:
        nothing = torch.full((1, 30), torch.nan, dtype=torch.float64)
        problem.updates, problem.fishers = (torch.cat([nothing, x]) for x in (problem.updates, problem.fishers))
        problem.n = [5, *problem.n]
        result = problem.aggregate(rule)
        assert result.scores[0].isnan()
        assert list(result.rejected) == [0]
        result = dataclasses.replace(
            result, **{name: getattr(result, name)[1:] for name in ("scores", "weights", "kept", "labels")}
        )
    else:
        result = rule.aggregate(problem.w, problem.store(tile=7)) if stored else problem.aggregate(rule)
    assert_is(result, expected)


def test_all_parameters_are_the_range_of_all_of_them():
    problem = random_round(1, 9, 5000)
    for discrepancy in SCORES:
        plain, ranged = (
            problem.aggregate(FDCR(discrepancy=discrepancy, parameters=parameters))
            for parameters in ("all", [(0, 5000)])
        )
        torch.testing.assert_close(ranged.scores, plain.scores, rtol=1e-5, atol=0)
        assert torch.equal(ranged.kept, plain.kept)


def test_lengths_do_not_count_in_the_cosine():
    problem = random_round(2, 8, 40, torch.float64)
    problem.updates[1:] = problem.updates[:1]
    problem.updates[5] *= -3
    problem.fishers[:] = problem.fishers[:1]
    problem.n = [10] * 8
    result = problem.aggregate(FDCR(discrepancy="cosine", cluster="kmeans"))
    assert result.dropped_clients == [5]
    assert result.scores.tolist() == pytest.approx([2.0 if k == 5 else 0.0 for k in range(8)])
    problem.updates[5] = 0
    still = problem.aggregate(FDCR(discrepancy="cosine", cluster="kmeans"))
    assert still.scores[5] == 1
    assert still.dropped_clients == [5]


def test_who_agrees_completely_is_kept_whatever_rounding_says():
    problem = random_round(3, 8, 40, torch.float64)
    problem.updates[:], problem.fishers[:] = problem.updates[:1].clone(), problem.fishers[:1].clone()
    for discrepancy in SCORES:
        result = problem.aggregate(FDCR(discrepancy=discrepancy, parameters=[(3, 20)]))
        assert result.scores.tolist() == [0] * 8
        assert result.kept.all()


def test_parameters_that_no_model_has():
    problem = random_round(4, 5, 30)
    with pytest.raises(ValueError, match=r"parameters='head' takes groups"):
        problem.aggregate(FDCR(parameters="head"))
    with pytest.raises(ValueError, match=r"ranges within 30 parameters, got \[3, 31\)"):
        problem.aggregate(FDCR(parameters=[(3, 31)]))
    with pytest.raises(ValueError, match="ranges overlap"):
        problem.aggregate(FDCR(parameters=[(3, 9), (8, 10)]))
    for wrong in ("tail", [], [(1, 2, 3)], [slice(0, 4, 2)], [(0.5, 2)], 3):
        with pytest.raises(ValueError, match="parameters must be one of"):
            FDCR(parameters=wrong)
