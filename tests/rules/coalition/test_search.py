"""The search for the coalition against its definition, written with loops."""

import itertools
import math

import pytest
import torch

from fdcr_fast.rules.coalition import search
from fdcr_fast.rules.coalition.search import Views, find_coalition


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


def best_by_trying(views):
    K = len(views)
    sets = itertools.chain.from_iterable(itertools.combinations(range(K), s) for s in range(1, (K - 1) // 2 + 1))
    return max(score(views, [k in members for k in range(K)]) for members in sets)


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


def test_too_few_clients():
    with pytest.raises(ValueError, match="at least 3 clients, got 2"):
        find_coalition(random_views(2))
