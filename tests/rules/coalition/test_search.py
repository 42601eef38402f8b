"""The search for the coalition against its definition, written with loops."""

import itertools
import math

import pytest
import torch

from fdcr_fast.rules.coalition import search
from fdcr_fast.rules.coalition.search import Views, find_coalition, margins, set_scores


def symmetric(K):
    x = torch.randn(K, K, dtype=torch.float64)
    return (x + x.T).fill_diagonal_(0)


def random_views(K):
    return Views(symmetric(K), torch.randn(K, dtype=torch.float64))


def planted_views(K, coalition, strength):
    views = random_views(K)
    views.similarity[torch.meshgrid(coalition, coalition, indexing="ij")] += strength
    views.similarity.fill_diagonal_(0)
    views.concentration[coalition] += strength
    return views


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def score(views, members):
    """J, from the formula."""
    A, c = views.similarity.tolist(), views.concentration.tolist()
    S = [k for k, inside in enumerate(members) if inside]
    R = [k for k, inside in enumerate(members) if not inside]
    across = list(itertools.product(S, R))
    bracket = mean(A[i][j] for i, j in itertools.permutations(R, 2)) - 2 * mean(A[i][j] for i, j in across)
    bracket += mean(c[k] for k in S) - mean(c[k] for k in R)
    if len(S) > 1:
        bracket += mean(A[i][j] for i, j in itertools.permutations(S, 2))
    return math.sqrt(len(S) * len(R)) * bracket


def score_of(views, clients):
    return score(views, [k in clients for k in range(len(views))])


def all_minorities(K):
    return [S for size in range(1, (K - 1) // 2 + 1) for S in itertools.combinations(range(K), size)]


def best_by_trying(views):
    return max(score_of(views, S) for S in all_minorities(len(views)))


@pytest.mark.parametrize("K", range(3, 10))
@pytest.mark.parametrize("seed", range(3))
def test_small_problems_are_solved_exactly(K, seed):
    torch.manual_seed(seed)
    views = random_views(K)
    members, found = find_coalition(views)
    assert found == pytest.approx(score(views, members.tolist()))
    assert found == pytest.approx(best_by_trying(views))
    assert 1 <= members.sum() <= (K - 1) // 2


@pytest.mark.parametrize("seed", range(8))
def test_the_large_search_finds_what_trying_all_sets_finds(monkeypatch, seed):
    torch.manual_seed(seed)
    views = planted_views(12, torch.randperm(12)[:4], 1.0)
    exact = find_coalition(views)
    monkeypatch.setattr(search, "_EXACT", 0)
    members, found = find_coalition(views)
    assert torch.equal(members, exact[0])
    assert found == pytest.approx(exact[1])


@pytest.mark.parametrize(("K", "size"), [(40, 12), (150, 5), (150, 60)])
def test_a_clear_coalition_is_found_among_many(K, size):
    torch.manual_seed(0)
    coalition = torch.randperm(K)[:size]
    views = planted_views(K, coalition, 9.0)
    members, found = find_coalition(views)
    expected = torch.zeros(K, dtype=torch.bool)
    expected[coalition] = True
    assert torch.equal(members, expected)
    assert found == pytest.approx(score(views, members.tolist()))


@pytest.mark.parametrize("exact", [0, 14])
def test_the_order_of_clients_does_not_matter(monkeypatch, exact):
    monkeypatch.setattr(search, "_EXACT", exact)
    torch.manual_seed(0)
    views, order = planted_views(11, torch.tensor([2, 3, 7]), 1.0), torch.randperm(11)
    shuffled = Views(views.similarity[order][:, order], views.concentration[order])
    assert torch.equal(find_coalition(views)[0][order], find_coalition(shuffled)[0])


def test_sets_have_the_score_of_the_formula():
    torch.manual_seed(0)
    views = random_views(20)
    members = torch.rand(30, 20) < torch.linspace(0.1, 0.8, 30)[:, None]
    assert 2 <= members.sum(1).min() < members.sum(1).max() <= 18
    expected = [score(views, row) for row in members.tolist()]
    assert set_scores(members, views).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("K", [3, 6, 9])
def test_margins_are_between_the_best_sets_with_and_without_a_client(K):
    torch.manual_seed(K)
    views = random_views(K)
    members, _ = find_coalition(views)
    found = margins(members, views)
    for k in range(K):
        having = max(score_of(views, S) for S in all_minorities(K) if k in S)
        lacking = max(score_of(views, S) for S in all_minorities(K) if k not in S)
        assert found[k] == pytest.approx(having - lacking)
    assert torch.equal(found > 0, members)


@pytest.mark.parametrize("size", [1, 4])
def test_margins_among_many_are_those_of_the_coalition_itself(size):
    torch.manual_seed(0)
    views = planted_views(30, torch.randperm(30)[:size], 90.0)
    members, best = find_coalition(views)
    S = set(members.nonzero().flatten().tolist())
    assert len(S) == size
    found = margins(members, views)
    for k in range(30):
        other = S ^ {k}
        changed = score_of(views, other) if other else 0.0
        assert found[k] == pytest.approx(best - changed if k in S else changed - best)
    assert torch.equal(found > 0, members)


def test_too_few_clients():
    with pytest.raises(ValueError, match="at least 3 clients, got 2"):
        find_coalition(random_views(2))
