"""How much one client may count for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fdcr_fast import FDCR, FedAvg
from fdcr_fast.round.shares import limited_shares
from tests.support.fdcr_rounds import attacked


@pytest.fixture
def low_precision():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_equal_shares_are_right_to_float64(low_precision):
    shares = limited_shares(torch.full((7,), 1 / 7, dtype=torch.float64), 0.1)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-15, atol=0)


@given(st.lists(st.just(0.0) | st.floats(1e-100, 1e18), min_size=1, max_size=50), st.floats(0.001, 1))
@example([1.0, 1e16, 4e16, 3e16], 1 / 3)  # what the three at the limit leave is less than rounding
def test_limited_shares_fill_up_like_water(counts, limit):
    counts = torch.tensor(counts, dtype=torch.float64)
    total = counts.sum()
    if total == 0 or not math.isfinite(1 / total):
        return
    shares = counts / total
    limited = limited_shares(shares, limit)
    positive = shares > 0
    torch.testing.assert_close(limited.sum(), torch.tensor(1.0).double())
    assert not limited[~positive].any()
    if positive.sum() * limit <= 1:
        assert limited[positive].unique().numel() == 1
        return
    assert limited.max() <= limit * (1 + 1e-12)
    free = positive & (limited < limit * (1 - 1e-9))
    if free.any():
        ratio = limited[free] / shares[free]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert ratio[0] >= 1 - 1e-9


@pytest.mark.parametrize("rule", [FDCR(max_weight_share=0.3), FedAvg(max_weight_share=0.3)])
def test_a_client_that_claims_a_quintillion_samples_counts_for_its_limit(rule):
    w, updates, fishers, n = attacked(attackers=0)
    n = n.double()
    n[3] = 1e18
    result = rule.aggregate(w, updates, fishers, n)
    assert result.weights.max() <= 0.3 + 1e-12
    torch.testing.assert_close(result.weights.sum(), torch.tensor(1.0).double())
    modest = rule.aggregate(w, updates, fishers, n.clamp(max=1e9))
    torch.testing.assert_close(modest.params, result.params, rtol=1e-4, atol=1e-4)
