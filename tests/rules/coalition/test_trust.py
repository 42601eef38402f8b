"""CoalitionFDCR's cautious start against its formulas, written with NumPy on whole matrices."""

import math

import numpy as np
import pytest
import torch

from fdcr_fast import CoalitionFDCR, CoalitionState
from fdcr_fast.rules.coalition.search import Views, find_coalition, margins, membership, minorities, set_scores
from fdcr_fast.rules.coalition.trust import attack_likelihood, believed, charges, core, trusted
from tests.rules.coalition.test_rule import (
    GROUPS,
    P,
    cosines,
    features,
    kept_by,
    reference_score,
    standard,
    uploads,
    z,
)


def kurtosis(D):
    return np.log((D**4).mean(1) / (D**2).mean(1) ** 2)


def lower_median(x):
    return sorted(x)[(len(x) - 1) // 2]


class Reference:
    """All clients in every round; at most 14 of them."""

    def __init__(self):
        self.round, self.A, self.c, self.x, self.e, self.counts = 0, 0, 0, 0, 0, 0
        self.beyond = 0  # how often agreement was more than is believed

    def step(self, w, D, F, n):
        """The step, who is kept, and the scores."""
        K, length = len(D), np.linalg.norm(D, axis=1)
        self.round += 1
        feat, known = D[:, features()], w[features()]
        u = (F / F.sum(1, keepdims=True)).mean(0)[features()] ** 0.25 * feat
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
        far = np.linalg.norm(feat, axis=1)
        self.A = 0.8 * self.A + standard(cosines(u - u.mean(0)))
        self.c = 0.8 * self.c + z(kurtosis(feat)) + z(kurtosis(D)) / 2
        sets = [row.nonzero().flatten().tolist() for row in minorities(K)]
        J = [reference_score(standard(self.A), 0.3 * z(self.c), S) for S in sets]
        total = sum(math.exp(j / 2) for j in J)
        p = np.array([sum(math.exp(j / 2) for j, S in zip(J, sets, strict=True) if k in S) / total for k in range(K)])
        evidence = feat @ np.median(feat, axis=0) / far
        if self.round > 1:
            self.x = 0.5 * self.x + feat @ known / far / np.linalg.norm(known)
            self.e = 0.5 * self.e + kurtosis(feat) - lower_median(kurtosis(feat))
            self.counts = 0.5 * self.counts + 1
            evidence = self.x / self.counts
            most = lower_median(evidence) + 0.3
            self.beyond += (evidence > most).sum()
            evidence = np.where(evidence > most, 3 * most - 2 * evidence, evidence)
        scores = z(p) - z(evidence) + 0.5 * z(self.c)
        kept = sorted(range(K), key=lambda k: scores[k])
        kept = kept[: max(1, math.floor(K * (0.3 + 0.1 * max(0, self.round - 2)) + 0.5))]
        if self.round > 2:
            usual = lower_median(evidence[kept])
            against = np.maximum(0, self.e / self.counts) + 1.5 * p / (1 + math.exp((5.6 * K**0.5 - max(J)) / 2))
            if usual > 0:
                against = against + np.maximum(0, 1 - evidence / usual)
            candidates = range(K) if self.round >= 5 else kept
            kept = [k for k in candidates if against[k] <= 1.2] or kept
        shares = np.array([n[k] if k in kept else 0.0 for k in range(K)]) / sum(n[k] for k in kept)
        return shares * np.minimum(1, lower_median(length) / length) @ D, kept, scores


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
        D[0] += (seed % 3 == 2) * w
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
    assert reference.beyond > 0


def test_the_core_grows_until_all_are_kept_against_whom_there_is_nothing():
    scores, nothing = torch.arange(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    against = nothing.clone()
    against[2], against[8] = 1.3, 1.3

    def kept(round, against=against):
        return trusted(core(scores, round), against, round).nonzero().flatten().tolist()

    assert kept(1) == kept(2) == [0, 1, 2], "the first rounds know nothing for certain"
    assert kept(3) == [0, 1, 3]
    assert kept(4) == [0, 1, 3, 4]
    assert kept(5) == kept(400) == [0, 1, 3, 4, 5, 6, 7, 9]
    assert kept(5, nothing) == list(range(10))
    assert kept(5, nothing + 2) == [0, 1, 2, 3, 4, 5], "somebody is kept"


def test_no_evidence_excuses_another():
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    nothing = charges(one, 1.0, -one, none)
    assert nothing.item() == 0
    assert charges(9 * one, 1.0, 1.2 * one, none).item() == 1.2, "agreement that is chosen"
    assert charges(9 * one, 1.0, -one, one).item() == 1.5
    assert charges(-one, 1.0, -one, none).item() == 2
    assert charges(-one, -2.0, -one, none).item() == 0, "a model that has learned nothing tells nothing"


def test_the_best_set_of_more_clients_must_stand_out_more():
    assert attack_likelihood(5.6 * 10**0.5, 10) == attack_likelihood(5.6 * 40**0.5, 40) == 0.5
    assert attack_likelihood(22, 10) > 0.85
    assert attack_likelihood(22, 20) < 0.2


def test_who_adds_the_model_to_its_update_is_dropped_all_the_same():
    generator = np.random.default_rng(0)
    rule, w = CoalitionFDCR(groups=GROUPS), generator.normal(size=P)
    for _ in range(12):
        D, F, n = uploads(10, generator.integers(1000))
        D[3, :2] = 20
        D += 0.3 * w
        D[3] += 3 * w
        result = kept_by(rule, D, F, n, "tensors", w=w)
    assert result.explanation[3].agreement > max(result.explanation[k].agreement for k in range(10) if k != 3)
    assert result.dropped_clients == [3]


@pytest.mark.parametrize("attackers", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 1, 4])
def test_who_agrees_more_than_data_can_make_it_is_never_kept(attackers, factor):
    generator = np.random.default_rng(attackers)
    rule, w = CoalitionFDCR(groups=GROUPS), generator.normal(size=P)
    for i in range(12):
        D, F, n = uploads(10, generator.integers(1000))
        D += generator.uniform(0, 0.3, size=(10, 1)) * w
        D[:attackers] = 0.05 * generator.normal(size=(attackers, P)) + factor * w
        result = kept_by(rule, D, F, n, "tensors", w=w)
        if i > 1:
            assert not result.kept[:attackers].any()
    assert result.kept[attackers:].sum() > 4


def test_agreement_is_believed_as_far_as_that_of_most():
    agreement = torch.tensor([-0.4, 0.1, 0.2, 0.3, 0.5, 0.6, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        believed(agreement), torch.tensor([-0.4, 0.1, 0.2, 0.3, 0.5, 0.6, -0.2], dtype=torch.float64)
    )


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
