"""What of a state is no parameter, ties that were lost, and one attacker who fills every field."""

import pytest
import torch
from torch import nn

from fdcr_fast import (
    FDCR,
    FLAME,
    Bulyan,
    CoordinateMedian,
    DnC,
    FedAvg,
    GeometricMedian,
    Krum,
    MultiKrum,
    ParamLayout,
    StateStore,
    TrimmedMean,
    aggregate_state_dicts,
)
from fdcr_fast.state_dicts.buffers import held_mean

K = 9
ROBUST = [
    CoordinateMedian(),
    TrimmedMean(num_byzantine=1),
    Krum(num_byzantine=1),
    MultiKrum(num_byzantine=1),
    Bulyan(num_byzantine=1),
    DnC(num_byzantine=1),
    GeometricMedian(max_weight_share=0.2),
    FLAME(noise=0.0),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("large", torch.tensor(2**62 + 12345))


def cloned(state):
    return {name: value.clone() for name, value in state.items()}


def honest_state(model):
    state = cloned(model.state_dict())
    for name, value in state.items():
        if value.is_floating_point() and value.isfinite().all() and name != "head.weight":
            value += 0.1 * torch.randn_like(value)
    state["norm.running_var"].abs_()
    state["norm.num_batches_tracked"] += 7
    state["head.weight"] = state["embedding.weight"].clone()
    return state


def attack(state):
    """Every field that a client can fill, at once."""
    for name, value in state.items():
        if name != "mask":
            state[name] = torch.full_like(value, 2**62 if not value.is_floating_point() else 1e6)
    state["head.weight"] = torch.full((6, 4), -1e6)
    return {**state, "extra": torch.ones(3), "module.norm.weight": torch.full((4,), 1e9)}


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("form", ["tied", "cloned", "arrays", "module.", "difference"])
@pytest.mark.parametrize("explicit", [False, True])
def test_one_attacker_cannot_leave_the_range_of_the_others(rule, form, explicit):
    model = Tied()
    own = model.state_dict()
    states = [honest_state(model) for _ in range(K - 1)]
    spoilt = attack(honest_state(model))
    sent = [*states, spoilt]
    given = own if form == "tied" else cloned(own)
    if form == "arrays":
        given, *sent = ({n: v.numpy() for n, v in state.items()} for state in (given, *sent))
    elif form == "module.":
        sent = [{f"module.{n}": v for n, v in s.items()} for s in states] + [spoilt]
    layout = ParamLayout.from_module(model) if explicit else None
    store = StateStore(given, K, layout=layout, with_fishers=False)
    for k, state in enumerate(sent):
        count = 1e90 if k == K - 1 else 1
        if form == "difference":
            store.put_update({n: state[n] - own[n] for n in state if n in own}, None, count, k)
        else:
            store.put_state(state, None, count, k)
    new, _ = store.aggregate(rule)
    new = {name: torch.as_tensor(value) for name, value in new.items()}
    assert set(new) == set(own)
    assert torch.equal(new["embedding.weight"], new["head.weight"])
    assert torch.equal(new["mask"], own["mask"])
    assert torch.equal(new["large"], own["large"])
    assert new["norm.num_batches_tracked"] == 7
    for name in ("embedding.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        values = torch.stack([state[name] for state in states])
        assert (new[name] >= values.amin(0) - 1e-5).all(), name
        assert (new[name] <= values.amax(0) + 1e-5).all(), name


def test_ties_that_were_lost_with_fishers_by_name_or_as_vectors():
    model = Tied()
    del model.mask, model.large
    layout = ParamLayout.from_module(model)
    states = [honest_state(model) for _ in range(K)]
    fishers = [torch.rand(layout.numel) for _ in range(K)]
    named = [layout.unflatten(fisher) for fisher in fishers]
    expected = aggregate_state_dicts(model, states, fishers, [1] * K)
    for form in (fishers, named, [list(each.values()) for each in named]):
        state = aggregate_state_dicts(cloned(model.state_dict()), states, form, [1] * K)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value)
    store = StateStore(cloned(model.state_dict()), K)
    for k in range(K):
        assert store.put_state(states[k], named[k], 1, k), store.rejected
    state, _ = store.aggregate(FDCR(cluster=None))
    assert torch.equal(state["embedding.weight"], state["head.weight"])


def test_equal_entries_that_are_not_tied_stay_apart():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    layout = ParamLayout(("0.weight", "0.bias", "1.bias"), ((3, 3), (3,), (3,)))
    states = []
    for _ in range(5):
        state = cloned(model.state_dict())
        state["0.weight"] += 1
        state["1.weight"] += 2
        states.append(state)
    states[0]["1.weight"] = states[0]["0.weight"].clone()  # one client says so
    new = aggregate_state_dicts(model.state_dict(), states, None, [1] * 5, rule=FedAvg(), layout=layout)
    torch.testing.assert_close(new["0.weight"], model[0].weight + 1)
    torch.testing.assert_close(new["1.weight"], model[1].weight + 1.8)


def test_what_a_difference_lacks_stays():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    store = StateStore(model, 2, with_fishers=False)
    own = model.state_dict()
    update = {name: torch.ones_like(own[name]) for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert store.put_update(update, None, 1, 0)
    assert not store.put_state(update, None, 1, 1)
    assert "missing buffer" in store.rejected[1]
    state, _ = store.aggregate(FedAvg())
    torch.testing.assert_close(state["0.weight"], own["0.weight"] + 1)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(state[name], own[name])


def test_buffers_that_are_not_finite():
    model = nn.Module()
    model.register_buffer("range", torch.tensor([torch.inf, -torch.inf, 1.0]))
    model.weight = nn.Parameter(torch.randn(4))
    seen = {**cloned(model.state_dict()), "range": torch.tensor([0.0, 2.0, 3.0])}
    unseen = cloned(model.state_dict())
    broken = {**unseen, "range": torch.tensor([-torch.inf, -torch.inf, 1.0])}

    def new(*states):
        result = aggregate_state_dicts(model, states, None, [1] * len(states), rule=FedAvg(), return_result=True)
        return result[0]["range"].tolist(), result[1].rejected

    assert new(seen, seen) == ([0.0, 2.0, 3.0], {})
    assert new(seen, unseen) == ([torch.inf, -torch.inf, 2.0], {})
    assert new(seen, broken) == ([0.0, 2.0, 3.0], {1: "buffer range is not finite"})


def test_the_mean_held_between_quartiles():
    values = torch.tensor([[1.0], [2], [3], [4], [100]], dtype=torch.float64)
    equal = torch.ones(5, dtype=torch.float64)
    assert held_mean(values, equal, None) == 22
    assert held_mean(values, equal, 1) == 4
    assert held_mean(values[:4], equal[:4], 1) == 2.5
    assert held_mean(values, torch.tensor([0, 0, 0, 0, 1.0]).double(), 2) == 3
    assert [FDCR().buffer_trim(k) for k in (1, 2, 3, 7, 8, 20)] == [0, 0, 1, 1, 2, 5]
    assert FedAvg().buffer_trim(9) is None
    assert FedAvg(norm_bound=10).buffer_trim(9) == 2
    assert CoordinateMedian().buffer_trim(9) == 4
