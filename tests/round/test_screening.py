"""Clients that cannot be used are rejected by name, and the others are aggregated as if these had not been there."""

from __future__ import annotations

import pytest
import torch

from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.store.update_store import UpdateStore
from tests.support.fdcr_rounds import Round, assert_is, random_round, transcribed

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
    torch.testing.assert_close(result.scores[rows], expected.discrepancy)
    assert torch.equal(result.kept[rows], expected.kept)
    assert torch.equal(result.labels[rows], expected.labels)
    if 2 in result.clients:
        row = result.clients.index(2)
        assert not result.kept[row]
        assert result.weights[row] == 0
        assert result.labels[row] == -1
        assert result.scores[row].isnan()


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
        assert len(result.scores) == rows


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


@pytest.mark.parametrize("options", [{}, {"copy": False}])
@pytest.mark.parametrize("rule", [FDCR(), FedAvg()])
def test_a_round_in_which_nobody_sent_anything(rule, options):
    w, store = torch.randn(20), UpdateStore(20, 3, **options)
    with pytest.raises(ValueError, match=r"at least one client, got an empty store.*keep"):
        rule.aggregate(w, store)
    with pytest.warns(UserWarning, match="an empty store; the global parameters stay as they are"):
        result = rule.aggregate(w, store, on_empty="keep")
    assert torch.equal(result.params, w)
    assert result.params.data_ptr() != w.data_ptr()
    assert result.clients == ()
    states = StateStore({"weight": w}, 3, **options)
    with pytest.warns(UserWarning, match="an empty store"):
        assert torch.equal(states.aggregate(rule, on_empty="keep")[0]["weight"], w)
