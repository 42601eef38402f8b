"""What all rules have in common."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fdcr_fast
from fdcr_fast import (
    CRFL,
    FLAME,
    RLR,
    AggregationRule,
    AlignIns,
    DnC,
    FedAvg,
    FoolsGold,
    GeometricMedian,
    MultiKrum,
    MultiMetrics,
    Sageflow,
    _native,
)
from tests.support.rival_rounds import RULES, Problem, kept, problem, quality

CLASSES = {type(make()) for make in RULES.values()}
NEEDS = {"krum": 5, "multi-krum": 7, "bulyan": 7, "dnc": 5}


def test_every_rule_is_tried():
    exported = {getattr(fdcr_fast, name) for name in fdcr_fast.__all__}
    rules = {x for x in exported if isinstance(x, type) and issubclass(x, AggregationRule)}
    assert rules - {AggregationRule, FedAvg, fdcr_fast.FDCR, fdcr_fast.CoalitionFDCR} == CLASSES


everyone = pytest.mark.parametrize("name", RULES)


# Sums over parameters are formed tile by tile, so that what depends on them is rounded as the tiles are.
ROUNDED = {"geometric median", "foolsgold", "flame", "fltrust", "alignins"}


def same(result, other, exactly=True):
    assert torch.equal(result.kept, other.kept)
    assert torch.equal(result.labels, other.labels)
    if exactly:
        assert torch.equal(result.params, other.params)
        assert torch.equal(result.weights, other.weights)
    else:
        torch.testing.assert_close(other.weights, result.weights, rtol=1e-11, atol=0)
        torch.testing.assert_close(other.params, result.params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.scores, result.discrepancy, rtol=1e-8, atol=1e-12, equal_nan=True)


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
            compiled = _native.loaded  # PyTorch's own matrix products depend on the number of threads
            same(expected, again, exactly=compiled)
            if compiled:
                assert torch.equal(again.scores.nan_to_num(), expected.discrepancy.nan_to_num())
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
    if name in ("median", "geometric median", "foolsgold", "fltrust", "multi-metrics", "flame", "alignins"):
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
        (AlignIns, {"top_share": 0}),
        (AlignIns, {"direction_radius": 0}),
        (AlignIns, {"sign_radius": math.inf}),
        (MultiMetrics, {"keep_share": 0}),
        (MultiMetrics, {"max_weight_share": 0}),
        (Sageflow, {"entropy_threshold": 0, "evaluate": quality}),
        (Sageflow, {"loss_exponent": math.nan, "evaluate": quality}),
    ],
)
def test_options_are_checked(rule, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        rule(**options)
