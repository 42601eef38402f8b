"""CoalitionFDCR against the formulas written with NumPy on whole matrices, with a bold start; see test_trust.py."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fdcr_fast import CoalitionFDCR, CoalitionState, ParamGroups, ParamLayout, UpdateStore

P = 60
GROUPS = ParamGroups((slice(50, 60),), (slice(0, 20), slice(25, 40)))
bold = partial(CoalitionFDCR, groups=GROUPS, start="bold")


def features():
    return np.r_[0:20, 25:40]


def standard(M):
    off = ~np.eye(len(M), dtype=bool)
    return np.where(off, (M - M[off].mean()) / M[off].std(), 0.0)


def z(x):
    return (x - x.mean()) / x.std()


def cosines(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def reference_views(D, F):
    Pbar = (F / F.sum(1, keepdims=True)).mean(0)
    head, feat = np.arange(50, 60), features()
    u = Pbar**0.25 * D
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    r = np.log((Pbar[head] * D[:, head] ** 2).sum(1) / (D[:, head] ** 2).sum(1))
    q = D[:, feat] ** 2 / (Pbar[feat] + 0.01 * Pbar.mean())
    kappa = np.log((q**2).mean(1) / q.mean(1) ** 2)
    return standard(cosines(u - u.mean(0))), z(r) + z(kappa)


def reference_score(A, c, S):
    K, s = len(c), len(S)
    R = [k for k in range(K) if k not in S]
    bracket = A[np.ix_(R, R)].sum() / (len(R) * (len(R) - 1)) - 2 * A[np.ix_(S, R)].mean() + c[S].mean() - c[R].mean()
    if s > 1:
        bracket += A[np.ix_(S, S)].sum() / (s * (s - 1))
    return math.sqrt(s * (K - s)) * bracket


class Reference:
    """All clients in every round."""

    def __init__(self):
        self.sums = [0, 0]

    def dropped(self, D, F):
        K = len(D)
        self.sums = [0.8 * total + view for total, view in zip(self.sums, reference_views(D, F), strict=True)]
        A, c = standard(self.sums[0]), 0.3 * z(self.sums[1])
        sets = itertools.chain.from_iterable(itertools.combinations(range(K), s) for s in range(1, (K - 1) // 2 + 1))
        return list(max(sets, key=lambda S: reference_score(A, c, list(S))))


def uploads(K, seed, coalition=()):
    generator = np.random.default_rng(seed)
    D, F = generator.normal(size=(K, P)), generator.exponential(size=(K, P))
    D[list(coalition)] += 2 * generator.normal(size=P)
    return D, F, generator.integers(10, 90, K)


def kept_by(rule, D, F, n, form, clients=None, w=None):
    w = torch.zeros(P, dtype=torch.float64) if w is None else torch.tensor(w)
    if form == "tensors":
        return rule.aggregate(w, torch.tensor(D), torch.tensor(F), n, client_ids=clients)
    store = UpdateStore(P, len(D), torch.float64, tile=7)
    for k in range(len(D)):
        store.put(D[k], F[k], n[k], client_id=k if clients is None else clients[k])
    return rule.aggregate(w, store)


@pytest.mark.parametrize("form", ["tensors", "store"])
@pytest.mark.parametrize("K", [3, 5, 8])
def test_drops_whom_the_formulas_drop_round_after_round(form, K):
    rule, reference = bold(), Reference()
    for seed in range(4):
        D, F, n = uploads(K, seed)
        result = kept_by(rule, D, F, n, form)
        dropped = reference.dropped(D, F)
        assert (~result.kept).nonzero().flatten().tolist() == dropped
        weights = np.where(result.kept, n, 0) / n[result.kept.numpy()].sum()
        np.testing.assert_allclose(result.params.numpy(), weights @ D, rtol=1e-12, atol=1e-14)
        for client, share in result.explanation.items():
            assert share.kept == result.kept[client]


@pytest.mark.parametrize(("K", "coalition"), [(8, (1, 4, 6)), (3, ())])
def test_the_shares_add_up_to_the_score(K, coalition):
    rule, reference = bold(), Reference()
    D, F, n = uploads(K, 0, coalition)
    result = kept_by(rule, D, F, n, "tensors")
    dropped = reference.dropped(D, F)
    assert len(dropped) == (K - 1) // 2
    A, c = reference_views(D, F)
    shares = [result.explanation[k] for k in dropped]
    brackets = sum(np.mean([getattr(s, part) for s in shares]) for part in ("similarity", "distance", "concentration"))
    size = len(dropped)
    assert math.sqrt(size * (K - size)) * brackets == pytest.approx(reference_score(A, 0.3 * z(c), dropped))


def test_sets_are_judged_after_the_round_as_they_were_in_it():
    rule, reference = bold(), Reference()
    assert rule.set_scores([0, 1]) is None
    for seed in range(3):
        D, F, n = uploads(8, seed, (2, 5, 6))
        result = kept_by(rule, D, F, n, "tensors")
        dropped = reference.dropped(D, F)
        A, c = standard(reference.sums[0]), 0.3 * z(reference.sums[1])
        order = [3, 7, 0, 1, 2, 6, 4, 5]  # whatever the order in which clients are named
        sets = [[1], [0, 4, 6], list(range(3))]
        members = torch.tensor([[k in members for k in range(8)] for members in sets])
        expected = [reference_score(A, c, [order[k] for k in members]) for members in sets]
        assert rule.set_scores(order)(members).tolist() == pytest.approx(expected)
        assert (result.scores > 0).nonzero().flatten().tolist() == dropped


def test_a_stored_state_judges_to_the_same_bits():
    rule = bold()
    for seed in range(3):
        again = rule.with_memory(rule.memory())
        D, F, n = uploads(9, seed)
        results = [kept_by(each, D, F, n, "tensors") for each in (rule, again)]
        assert torch.equal(results[0].scores, results[1].scores)
        assert torch.equal(rule.state.similarity, rule.state.similarity.T)


def test_scales_of_updates_and_fishers_do_not_matter():
    D, F, n = uploads(9, 3, (0, 5))
    scale = np.logspace(-3, 3, 9)[:, None]
    plain, scaled = (
        kept_by(bold(norm_bound=None), *data, n, "tensors").kept for data in ((D, F), (D * scale, F * scale[::-1]))
    )
    assert torch.equal(plain, scaled)


def test_clients_come_and_go_and_the_state_goes_with_the_server():
    rounds = [["a", "b", "c", "d", "e"], ["c", "d", "e", "f"], ["f", "a", "b", "new", "e", "d"]]
    rule, stored = bold(), bold()
    for seed, clients in enumerate(rounds):
        D, F, n = uploads(len(clients), seed)
        one = kept_by(rule, D, F, n, "store", clients)
        other = kept_by(stored, D, F, n, "tensors", clients)
        assert torch.equal(one.kept, other.kept)
        stored = bold(state=CoalitionState.from_json(stored.state.to_json()))
    assert stored.state.clients == ["a", "b", "c", "d", "e", "f", "new"]


def test_rejected_clients_leave_no_trace():
    D, F, n = uploads(7, 1, (2, 3))
    D[6] = np.nan
    with_bad = bold()
    result = kept_by(with_bad, D, F, n, "tensors")
    without = bold()
    expected = kept_by(without, D[:6], F[:6], n[:6], "tensors")
    assert torch.equal(result.kept[:6], expected.kept)
    assert torch.equal(result.params, expected.params)
    assert set(result.rejected) == {6}
    assert with_bad.state.clients == without.state.clients
    assert 6 not in result.explanation


@pytest.mark.parametrize("K", [1, 2])
def test_too_few_for_a_majority_are_all_kept(K):
    D, F, n = uploads(K, 0)
    for start in ("cautious", "bold"):
        assert kept_by(CoalitionFDCR(start=start), D, F, n, "tensors").kept.all()


def test_degenerate_uploads():
    """Zero updates and equal clients have no angles: nothing becomes NaN."""
    D, F, n = uploads(6, 0)
    D[:] = D[0]
    F[:] = F[0]
    result = kept_by(bold(), D, F, n, "tensors")
    assert result.params.isfinite().all()
    D[2] = 0
    rule = bold()
    assert kept_by(rule, D, F, n, "tensors").params.isfinite().all()
    assert rule.state.similarity.isfinite().all()
    assert rule.state.concentration.isfinite().all()


def without_kurtosis(D, features):
    D[9] = 0


def the_head_alone(D, features):
    D[9, features] = 0


def far_below_all_numbers(D, features):
    D[9] = 1e-90


@pytest.mark.parametrize("change", [without_kurtosis, the_head_alone, far_below_all_numbers])
@pytest.mark.parametrize("round", [1, 2, 3])
def test_an_update_without_angles_switches_nothing_off(change, round):
    params, features = 500, slice(0, 400)
    generator = np.random.default_rng(0)
    rule = CoalitionFDCR(groups=ParamGroups((slice(450, params),), (features,)))
    w = generator.normal(size=params)
    for i in range(1, 13):
        D = 0.01 * generator.normal(size=(10, params)) + 0.002 * w  # clients whom the model explains, but for three
        D[:3] = 0.001 * generator.normal(size=(3, params)) - 0.002 * w
        D[:3, :20] += 0.5
        if i == round:
            change(D, features)
        kept = rule.aggregate(w, D, generator.uniform(size=(10, params)), [1] * 10).kept.tolist()
        if i >= 5:
            assert kept == [k >= 3 for k in range(10)], i
    assert rule.with_memory(rule.memory()).state == rule.state


@pytest.mark.parametrize(("score", "dropped"), [(3.4, []), (3.6, [0, 1])])
def test_the_gate_compares_the_score_with_those_of_permuted_views(monkeypatch, score, dropped):
    """Chance scores of mean 2 and standard deviation 1: the gate opens at 3.5."""
    searched = []

    def scored(views):
        searched.append(views)
        chance = 2 + [0, 1.5**0.5, -(1.5**0.5)][len(searched) % 3]
        return torch.arange(8) < 2, score if len(searched) == 1 else chance

    monkeypatch.setattr("fdcr_fast.rules.coalition.rule.find_coalition", scored)
    rule = bold(gate=True, gate_from=0)
    result = kept_by(rule, *uploads(8, 0), "tensors")
    assert (~result.kept).nonzero().flatten().tolist() == dropped
    first, *permuted = searched
    assert len(permuted) == 19
    for views in permuted:
        assert torch.equal(views.similarity, first.similarity)
        assert torch.equal(views.concentration.sort().values, first.concentration.sort().values)
    assert any(not torch.equal(views.concentration, first.concentration) for views in permuted)


def test_the_gate_is_open_in_the_first_rounds():
    rule = bold(gate=True, gate_from=2)
    always = bold()
    for seed in range(2):
        data = uploads(8, seed)
        assert torch.equal(kept_by(rule, *data, "tensors").kept, kept_by(always, *data, "tensors").kept)


def test_groups_of_models():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3)
    )
    layout = ParamLayout.from_module(model)
    by_shape, by_type = ParamGroups.from_layout(layout), ParamGroups.from_module(model)
    assert by_shape == by_type
    assert by_type.head == (layout.slices["5.weight"], layout.slices["5.bias"])
    assert by_type.features == tuple(layout.slices[f"{i}.{p}"] for i in (0, 2) for p in ("weight", "bias"))
    two = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert ParamGroups.from_module(two).features == (slice(0, 12), slice(12, 16))
    one = nn.Linear(3, 4)
    assert ParamGroups.from_module(one).features == ParamGroups.from_module(one).head == (slice(0, 12), slice(12, 16))
    assert ParamGroups.from_module(nn.Conv2d(1, 2, 3)) == ParamGroups.whole(20)


def test_a_minority_of_forged_fishers_moves_the_views_little():
    """Whatever Fisher attackers upload, it counts by its share: they cannot choose whom they resemble."""
    D, F, n = uploads(10, 2, (0, 3, 7))
    forged = F.copy()
    forged[0], forged[3], forged[7] = F[1], F[[1, 2, 4]].mean(0), np.eye(P)[0] + 1e-9
    for fishers in (F, forged):
        result = kept_by(bold(), D, fishers, n, "tensors")
        assert (~result.kept).nonzero().flatten().tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gate": True}, 'gate goes with start="bold"'),
        ({"start": "fast"}, "start of CoalitionFDCR must be 'cautious' or"),
        ({"decay": 0.0}, "decay must be in"),
        ({"decay": 1.1}, "decay"),
        ({"max_clients": 0}, "max_clients"),
    ],
)
def test_options_that_cannot_be(option, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CoalitionFDCR(**option)


def test_the_memory_is_bounded():
    rule = bold(max_clients=6)
    for seed in range(3):
        kept_by(rule, *uploads(4, seed), "tensors", [f"{seed}-{k}" for k in range(4)])
    assert len(rule.state.clients) == 6


@pytest.mark.parametrize("regularisation", [0.0, -1.0, math.inf, math.nan])
def test_regularisation_must_be_positive(regularisation):
    with pytest.raises(ValueError, match="regularisation must be positive and finite"):
        CoalitionFDCR(regularisation=regularisation)
