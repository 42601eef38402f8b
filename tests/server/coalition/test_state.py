"""The memory of a coalition rule: clients that come, stay away, and leave; storage as text."""

import json

import pytest
import torch

from fdcr_fast.server.coalition.search import Views
from fdcr_fast.server.coalition.state import CoalitionState


def views(K, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(K, K, dtype=torch.float64, generator=generator) for _ in range(2))
    c = torch.randn(K, dtype=torch.float64, generator=generator)
    return Views((A + A.T).fill_diagonal_(0), (B + B.T).fill_diagonal_(0), c)


ROUNDS = [["a", "b", 3], ["b", 3, "d"], ["d", "a"], [3, "b", "a", 7]]


def test_means_are_over_the_rounds_that_clients_spent_together():
    state = CoalitionState()
    seen = []
    for i, clients in enumerate(ROUNDS):
        view = views(len(clients), i)
        seen.append((clients, view))
        means = state.remember(clients, view)
        for x, one in enumerate(clients):
            for y, other in enumerate(clients):
                both = [(c.index(one), c.index(other), v) for c, v in seen if one in c and other in c]
                for name in ("update", "importance"):
                    expected = sum(getattr(v, name)[p, q] for p, q, v in both) / len(both)
                    assert getattr(means, name)[x, y] == pytest.approx(expected)
            alone = [v.concentration[c.index(one)] for c, v in seen if one in c]
            assert means.concentration[x] == pytest.approx(sum(alone) / len(alone))


def remembered():
    state = CoalitionState()
    for i, clients in enumerate(ROUNDS):
        state.remember(clients, views(len(clients), i))
    return state


def assert_equal(one, other):
    assert one.clients == other.clients
    for name in ("update", "importance", "together", "concentration"):
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
    assert after.update[0, 1] != before.update[0, 1]
    assert state.together[0, 0] == 5
    fresh = CoalitionState()
    fresh.remember(["x", "y"], views(2, 1))
    fresh.forget(["x", "y"])
    assert_equal(fresh, CoalitionState())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "expected a coalition state"),
        (lambda d: d.update(clients=["a"]), "update of a coalition state to be 1 finite numbers"),
        (lambda d: d.update(clients=["a", "a", 3, "d", 7]), "names a client twice"),
        (lambda d: d.update(clients=["a", None, 3, "d", 7]), "strings or integers"),
        (lambda d: d.update(clients=["a", True, 3, "d", 7]), "strings or integers"),
        (lambda d: d["importance"].pop(), "importance .* 15 finite numbers"),
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
