"""CoalitionFDCR's cautious start against its formulas, written with NumPy on whole matrices."""

import math

import numpy as np
import pytest
import torch

from fdcr_fast import CoalitionFDCR, CoalitionState
from fdcr_fast.rules.coalition.search import Views, find_coalition, margins, membership, minorities, set_scores
from fdcr_fast.rules.coalition.trust import trusted
from tests.rules.coalition.test_rule import (
    GROUPS,
    P,
    features,
    kept_by,
    reference_score,
    reference_views,
    standard,
    uploads,
    z,
)


class Reference:
    """All clients in every round; at most 14 of them."""

    def __init__(self):
        self.round, self.A, self.c, self.x, self.counts = 0, 0, 0, 0, 0

    def step(self, w, D, F, n):
        """The step, who is kept, and the scores."""
        K, length = len(D), np.linalg.norm(D, axis=1)
        self.round += 1
        A, _ = reference_views(D, F)
        feat, known = D[:, features()], w[features()]
        far = np.linalg.norm(feat, axis=1)
        c = z(np.log((feat**4).mean(1) / (feat**2).mean(1) ** 2))
        self.A, self.c = 0.8 * self.A + A, 0.8 * self.c + c
        sets = [row.nonzero().flatten().tolist() for row in minorities(K)]
        J = [reference_score(standard(self.A), 0.3 * z(self.c), S) for S in sets]
        total = sum(math.exp(j / 2) for j in J)
        p = np.array([sum(math.exp(j / 2) for j, S in zip(J, sets, strict=True) if k in S) / total for k in range(K)])
        evidence = feat @ np.median(feat, axis=0) / far
        if self.round > 1:
            self.x = 0.5 * self.x + feat @ known / far / np.linalg.norm(known)
            self.counts = 0.5 * self.counts + 1
            evidence = self.x / self.counts
        scores = z(p) - z(evidence) + 0.5 * z(self.c)
        core = sorted(range(K), key=lambda k: scores[k])
        core = core[: max(1, math.floor(K * (0.3 + 0.1 * max(0, self.round - 2)) + 0.5))]
        kept = list(core)
        if self.round > 2:
            middle = sorted(evidence[core])[(len(core) - 1) // 2]
            agree = [k for k in range(K) if evidence[k] >= min((0.2 + 0.3 * p[k]) * middle, middle)]
            kept = agree if self.round >= 5 and len(agree) == K else [k for k in core if k in agree]
        longest = sorted(length)[(K - 1) // 2]
        shares = np.array([n[k] if k in kept else 0.0 for k in range(K)]) / sum(n[k] for k in kept)
        return shares * np.minimum(1, longest / length) @ D, kept, scores


@pytest.mark.parametrize("form", ["tensors", "store"])
@pytest.mark.parametrize("K", [3, 5, 8])
def test_keeps_whom_the_formulas_keep_round_after_round(form, K):
    rule, reference = CoalitionFDCR(groups=GROUPS), Reference()
    generator = np.random.default_rng(1)
    sizes = set()
    for seed in range(9):
        D, F, n = uploads(K, seed, range(K // 3))
        w = 3 * generator.normal(size=P) if seed else np.zeros(P)
        D = D + 0.2 * generator.uniform(-0.5, 1, size=(K, 1)) * w
        result = kept_by(rule, D, F, n, form, w=w)
        step, kept, scores = reference.step(w, D, F, n)
        assert result.kept.nonzero().flatten().tolist() == sorted(kept)
        np.testing.assert_allclose(result.scores.numpy(), scores, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(result.params.numpy(), w + step, rtol=1e-12, atol=1e-12)
        for client, share in result.explanation.items():
            assert share.kept == result.kept[client]
            assert (share.agreement is None) == (seed == 0)
        sizes.add(len(kept))
    assert len(sizes) > (K > 3), "the core grows"


def test_the_core_grows_and_leaves_out_who_does_not_agree():
    n = torch.zeros(10, dtype=torch.float64)
    scores = torch.arange(10, dtype=torch.float64)
    agreement = torch.full_like(n, 0.4)
    agreement[2], agreement[7], agreement[8] = 0.07, 0.11, 0.11
    membership = n.clone()
    membership[8] = 1.0  # the likelier a client is in a coalition, the more it must agree

    def kept(round, agreement=agreement):
        return trusted(scores, membership, agreement, round).nonzero().flatten().tolist()

    assert kept(1, None) == kept(2) == [0, 1, 2], "the first rounds do not look at agreement alone"
    assert kept(3) == [0, 1, 3]
    assert kept(7) == [0, 1, 3, 4, 5, 6, 7]
    assert kept(9) == kept(400) == [0, 1, 3, 4, 5, 6, 7, 9]
    assert kept(9, -1 - scores) == [0, 1, 2, 3, 4, 5], "at least half of the core is kept where all shrink the model"
    assert kept(9, 0 * agreement) == list(range(10))


def test_all_are_kept_from_the_fifth_round_on_where_all_agree():
    scores = torch.arange(10, dtype=torch.float64)
    agreement = torch.full_like(scores, 0.4)

    def kept(round):
        return int(trusted(scores, 0 * scores, agreement, round).sum())

    assert [kept(4), kept(5)] == [5, 10]
    agreement[9] = 0.07
    assert kept(5) == 6, "one who does not agree, in the core or not, is a reason to wait"


def views(K, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(K, K, dtype=torch.float64)
    return Views((x + x.T).fill_diagonal_(0), torch.randn(K, dtype=torch.float64))


def test_membership_is_a_mean_over_all_minorities():
    found = views(9)
    sets = minorities(9)
    likelihood = (set_scores(sets, found) / 2).exp()
    expected = [(likelihood[sets[:, k]].sum() / likelihood.sum()).item() for k in range(9)]
    assert membership(find_coalition(found)[0], found).tolist() == pytest.approx(expected)


def test_of_many_clients_membership_compares_the_coalition_with_and_without_each():
    found = views(30)
    members, _ = find_coalition(found)
    odds = (margins(members, found) / 2).exp()
    assert membership(members, found).tolist() == pytest.approx((odds / (1 + odds)).tolist())


def test_who_attacks_alone_is_dropped_and_nobody_where_nobody_does():
    """Updates that lengthen the model, but for those of an attacker, who resembles nobody."""
    generator = np.random.default_rng(0)
    for attackers in ((), (3,)):
        rule, w = CoalitionFDCR(groups=GROUPS), generator.normal(size=P)
        for _ in range(12):
            D, F, n = uploads(10, generator.integers(1000))
            D = D + w
            D[list(attackers)] -= 2 * w
            result = kept_by(rule, D, F, n, "tensors", w=w)
        assert result.dropped_clients == list(attackers)


def test_who_changes_few_features_most_is_not_in_the_first_core():
    D, F, n = uploads(10, 0)
    rule = CoalitionFDCR(groups=GROUPS)
    core = kept_by(rule, D, F, n, "tensors").kept.nonzero().flatten().tolist()
    for client in core:
        peaked = D.copy()
        peaked[client, features()[:2]] *= 20
        assert not kept_by(CoalitionFDCR(groups=GROUPS), peaked, F, n, "tensors").kept[client]
        peaked = D.copy()
        peaked[client, np.setdiff1d(np.arange(P), features())] *= 1.01  # of all else nothing but the similarity changes
        assert kept_by(CoalitionFDCR(groups=GROUPS), peaked, F, n, "tensors").kept[client]


def test_a_stored_state_goes_on_to_the_same_bits_and_one_of_before_is_read():
    rule, w = CoalitionFDCR(groups=GROUPS), np.ones(P)
    for seed, clients in enumerate(["abcdefg", "cdefgh", "abcdegh", "abdefh"]):
        again = CoalitionFDCR(groups=GROUPS, state=CoalitionState.from_json(rule.state.to_json()))
        D, F, n = uploads(len(clients), seed)
        one, other = (kept_by(each, D, F, n, "tensors", list(clients), w=w) for each in (rule, again))
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.params, other.params)
        assert rule.state == again.state
    assert rule.state.agreed.min() > 0
    before = rule.state.to_json().replace('"agreement"', '"unknown"').replace('"agreed"', '"unknown too"')
    old = CoalitionState.from_json(before)
    assert old.agreed.tolist() == [0.0] * 8
    assert torch.equal(old.similarity, rule.state.similarity)


def test_the_scale_of_an_update_is_bounded_by_the_median():
    D, F, n = uploads(9, 3)
    D[4] *= 50
    rule = CoalitionFDCR(groups=GROUPS)
    for _ in range(9):
        result = kept_by(rule, D, F, n, "tensors", w=D.sum(0))
    length = np.linalg.norm(D, axis=1)
    shares = np.where(result.kept, n, 0) / n[result.kept.numpy()].sum()
    np.testing.assert_allclose(result.weights.numpy(), shares * np.minimum(1, np.sort(length)[4] / length), rtol=1e-12)
