"""State dicts that are taken in one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fdcr_fast import (
    FDCR,
    CoalitionFDCR,
    CoordinateMedian,
    FedAvg,
    Krum,
    ParamLayout,
    StateStore,
    aggregate_state_dicts,
)
from tests.support.federation import network

K = 5
COUNTS = [3, 1, 4, 1, 5]


def trained(state, seed):
    torch.manual_seed(seed)
    return {
        name: value + (torch.rand(value.shape) if value.is_floating_point() else seed) for name, value in state.items()
    }


def difference(new, old):
    return {name: new[name] - old[name] for name in old}


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_a_store_says_what_it_holds():
    state = network().state_dict()
    store = StateStore(state, K)
    store.put_state(trained(state, 1), torch.rand(store.layout.numel), 3, "first")
    store.put_state({}, torch.rand(store.layout.numel), 3, "second")
    assert repr(store) == (
        "StateStore of 6 parameters: UpdateStore(num_params=51, capacity=5, dtype=torch.float32): 1 clients, 1 rejected"
    )


def test_rounds_one_after_the_other_are_those_of_aggregate_state_dicts(tmp_path):
    model = network()
    layout, state = ParamLayout.from_module(model), model.state_dict()
    store = StateStore(state, K, path=tmp_path / "round.store")
    for r in range(2):
        store.clear(state)
        clients = [trained(state, 10 * r + k) for k in range(K)]
        fishers = [layout.unflatten(torch.rand(layout.numel)) for _ in range(K)]
        for k in range(K):
            upload = copy.deepcopy(clients[k])
            assert store.put(upload, fishers[k], COUNTS[k], k)
            for value in upload.values():  # the store keeps nothing of what it was given
                value.fill_(99)
        expected, chosen = aggregate_state_dicts(state, clients, fishers, COUNTS, return_result=True)
        state, result = store.aggregate(FDCR())
        assert torch.equal(result.kept, chosen.kept)
        assert_same_state(state, expected)


def test_differences_say_the_same_as_states():
    state = network().state_dict()
    clients = [trained(state, k) for k in range(K)]
    expected = aggregate_state_dicts(state, clients, None, COUNTS, rule=FedAvg())
    store = StateStore(state, K, with_fishers=False)
    for k, client in enumerate(clients):
        sent = difference(client, state)
        assert store.put(sent, None, COUNTS[k], k, difference=True)
    assert_same_state(store.aggregate(FedAvg())[0], expected)


@pytest.mark.parametrize("as_difference", [False, True])
def test_what_is_no_float_is_no_parameter(as_difference):
    state = network().state_dict()
    store = StateStore(state, K, with_fishers=False)
    for k, dtype in enumerate((torch.int64, torch.bool, torch.complex64)):
        upload = {**trained(state, k), "3.bias": torch.ones(3, dtype=dtype)}
        assert not store.put(upload, None, 1, k, difference=as_difference)
        assert "parameter 3.bias must be floating point" in store.rejected[k]
    store.reject(3, "it sent nothing")
    assert store.put(trained(state, 4), None, 1, 4)
    store.reject(4, "too late: it is accepted")
    assert list(store.aggregate(FedAvg())[1].rejected) == [0, 1, 2, 3]


def test_a_second_contribution_changes_nothing():
    state = network().state_dict()
    store = StateStore(state, K, with_fishers=False)
    first = trained(state, 1)
    assert store.put(first, None, 1, "a")
    assert not store.put(trained(state, 2), None, 1, "a")
    assert_same_state(store.aggregate(FedAvg())[0], aggregate_state_dicts(state, [first], None, [1], rule=FedAvg()))


def test_clients_may_be_trained_in_the_model_that_was_sent():
    model, layout = network(), ParamLayout.from_module(network())
    sent = {**copy.deepcopy(model.state_dict()), "flags": torch.tensor([True, False])}
    own = {**model.state_dict(), "flags": sent["flags"].clone()}
    store = StateStore(own, K, layout=layout, with_fishers=False)
    clients = [{**trained(model.state_dict(), k), "flags": sent["flags"]} for k in range(K)]
    for k, client in enumerate(clients):
        for name, value in own.items():
            value.copy_(client[name])
        own["flags"].fill_(True)
        assert store.put_state(own, None, COUNTS[k], k)
    expected = aggregate_state_dicts(sent, clients, None, COUNTS, rule=FedAvg(), layout=layout)
    assert_same_state(store.aggregate(FedAvg())[0], expected)


def test_a_clear_that_fails_changes_nothing():
    state = network().state_dict()
    store = StateStore(state, K, with_fishers=False)
    assert store.put_state(trained(state, 0), None, 1, 0)
    with pytest.raises(ValueError, match="missing parameters"):
        store.clear(nn.Linear(3, 2))
    assert_same_state(store.aggregate(FedAvg())[0], trained(state, 0))


@pytest.mark.parametrize("rule", [FDCR(), FedAvg(), CoordinateMedian(), Krum(num_byzantine=1), CoalitionFDCR()])
def test_a_store_that_does_not_copy_gives_the_same_bits(rule):
    model = nn.Sequential(nn.Linear(40, 300), nn.BatchNorm1d(300), nn.Linear(300, 5))  # several spans of parameters
    state = model.state_dict()
    layout = ParamLayout.from_module(model)
    copying, borrowing = (StateStore(state, K, layout=layout, copy=copy) for copy in (True, False))
    for k in range(K):
        torch.manual_seed(k)
        client = {name: value + (0.1 + 0.1 * k) * torch.randn(value.shape) for name, value in state.items()}
        fisher = torch.rand(layout.numel)
        sent = [client, fisher] if k != 3 else [difference(client, state), layout.unflatten(fisher)]
        for store in (copying, borrowing):
            put = store.put_update if k == 3 else store.put_state
            assert put(*sent, COUNTS[k], k)
        torch.testing.assert_close(borrowing.updates[k].update, copying.updates[k].update, rtol=0, atol=0)
        torch.testing.assert_close(borrowing.updates[k].fisher, fisher, rtol=0, atol=0)
    expected = copying.aggregate(rule)
    rule.reset()
    found = borrowing.aggregate(rule)
    assert torch.equal(found[1].kept, expected[1].kept)
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value)


def test_a_store_that_does_not_copy_tells_bad_numbers_when_it_is_aggregated():
    state = network().state_dict()
    store = StateStore(state, K, copy=False)
    for k in range(K):
        client = trained(state, k)
        if k == 2:
            client["3.bias"] = torch.full((3,), torch.nan)
        fisher = torch.rand(store.layout.numel) * (torch.nan if k == 4 else 1)
        assert store.put(client, fisher, COUNTS[k], k)
    result = store.aggregate(FDCR())[1]
    assert result.rejected.keys() == {2, 4}
    assert "update is not finite" in result.rejected[2]
    assert "Fisher is not finite" in result.rejected[4]
    assert not result.kept[result.clients.index(2)]
    assert not result.kept[result.clients.index(4)]


@pytest.mark.parametrize("copy", [True, False])
def test_a_buffer_whose_memory_was_freed_rejects_its_client(copy):
    state = network().state_dict()
    store, client = StateStore(state, K, with_fishers=False, copy=copy), trained(state, 0)
    name = next(name for name in client if name.endswith("running_mean"))
    client[name] = client[name].clone()
    client[name].untyped_storage().resize_(0)
    assert not store.put_state(client, None, 1, 0)
    assert "its memory was freed" in store.rejected[0]


def test_a_store_that_does_not_copy_has_no_file(tmp_path):
    with pytest.raises(ValueError, match="has no memory of its own"):
        StateStore(network().state_dict(), K, copy=False, path=tmp_path / "round.store")


def test_warnings_show_the_callers_line():
    state = network().state_dict()
    store = StateStore(state, K, with_fishers=False)
    with pytest.warns(UserWarning, match="those given are ignored") as caught:
        store.put_state(trained(state, 0), torch.rand(store.layout.numel), 1, 0)
    assert caught[0].filename == __file__
