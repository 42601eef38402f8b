"""The memory of a coalition rule: clients that come, stay away, and leave; storage as text."""

import json

import pytest
import torch

from fdcr_fast.rules.coalition.search import Views
from fdcr_fast.rules.coalition.state import CoalitionState


def views(K, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(K, K, dtype=torch.float64, generator=generator)
    c = torch.randn(K, dtype=torch.float64, generator=generator)
    return Views((A + A.T).fill_diagonal_(0), c)


ROUNDS = [["a", "b", 3], ["b", 3, "d"], ["d", "a"], [3, "b", "a", 7]]


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_means_are_over_the_rounds_that_clients_spent_together(decay):
    state = CoalitionState()
    seen = []
    for now, clients in enumerate(ROUNDS):
        view = views(len(clients), now)
        seen.append((clients, view))
        means = state.remember(clients, view, decay=decay)

        def mean(value, *present, now=now):
            met = [(decay ** (now - t), c, v) for t, (c, v) in enumerate(seen) if set(present) <= set(c)]
            return sum(w * value(c, v) for w, c, v in met) / sum(w for w, _, _ in met)

        for x, one in enumerate(clients):
            for y, other in enumerate(clients):
                expected = mean(lambda c, v, i=one, j=other: v.similarity[c.index(i), c.index(j)], one, other)
                assert means.similarity[x, y] == pytest.approx(expected)
            alone = mean(lambda c, v, i=one: v.concentration[c.index(i)], one)
            assert means.concentration[x] == pytest.approx(alone)
    assert state.rounds == len(ROUNDS)


def test_those_away_longest_make_room():
    state = CoalitionState()
    for clients in (["a", "b"], ["c", "d"], ["a", "e"]):
        state.remember(clients, views(2, 0), max_clients=4)
    assert state.clients == ["a", "c", "d", "e"], "b was away longest"
    state.remember(list("vwxyz"), views(5, 0), max_clients=4)
    assert state.clients == list("vwxyz"), "a round is remembered whole"
    assert state.similarity.shape == state.together.shape == (5, 5)
    assert state.seen.tolist() == [4] * 5
    assert (state.together == 1).all()


def remembered():
    state = CoalitionState()
    for i, clients in enumerate(ROUNDS):
        state.remember(clients, views(len(clients), i))
    return state


def assert_equal(one, other):
    assert one.clients == other.clients
    assert one.rounds == other.rounds
    for name in ("similarity", "together", "concentration", "seen"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_stored_state_goes_on_bit_for_bit():
    state = remembered()
    again = CoalitionState.from_json(state.to_json())
    assert_equal(state, again)
    for each in (state, again):
        each.remember(["a", "new", 7], views(3, 9))
    assert_equal(state, again)
    assert_equal(CoalitionState(), CoalitionState.from_json(CoalitionState().to_json()))


def test_who_is_forgotten_was_never_there():
    state = remembered()
    before = state.remember(["b", 3], views(2, 5))
    state.forget(["a", "unknown"])
    assert state.clients == ["b", 3, "d", 7]
    after = state.remember(["b", 3], views(2, 5))
    assert after.similarity[0, 1] != before.similarity[0, 1]
    assert state.together[0, 0] == 5
    fresh = CoalitionState()
    fresh.remember(["x", "y"], views(2, 1))
    fresh.forget(["x", "y"])
    assert_equal(fresh, CoalitionState(rounds=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "expected a coalition state"),
        (lambda d: d.update(clients=["a"]), "similarity of a coalition state to be 1 finite numbers"),
        (lambda d: d.update(clients=["a", "a", 3, "d", 7]), "names a client twice"),
        (lambda d: d.update(clients=["a", None, 3, "d", 7]), "strings or integers"),
        (lambda d: d.update(clients=["a", True, 3, "d", 7]), "strings or integers"),
        (lambda d: d["similarity"].pop(), "similarity .* 15 finite numbers"),
        (lambda d: d.update(rounds=-1), "rounds of a coalition state are a count, got -1"),
        (lambda d: d["seen"].pop(), "seen .* 5 finite numbers"),
        (lambda d: d["concentration"].append("x"), "concentration"),
        (lambda d: d.pop("together"), "together"),
    ],
)
def test_what_is_not_a_state_is_refused(change, message):
    data = json.loads(remembered().to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        CoalitionState.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}'])
def test_what_is_not_text_of_a_state_is_refused(text):
    with pytest.raises(ValueError, match="coalition state"):
        CoalitionState.from_json(text)


def test_ids_must_be_storable():
    with pytest.raises(ValueError, match=r"strings or integers, got \(1, 2\)"):
        CoalitionState().remember([(1, 2)], views(1, 0))
