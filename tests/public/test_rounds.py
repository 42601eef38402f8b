"""Rounds begin and end, and nothing that was meant otherwise passes in silence."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fdcr_fast import (
    FDCR,
    CoalitionFDCR,
    CoordinateMedian,
    FedAvg,
    FLTrust,
    FoolsGold,
    MultiKrum,
    ParamLayout,
    StateStore,
    TrimmedMean,
    UpdateStore,
    aggregate_state_dicts,
)

P, K = 40, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def filled(round, path=None):
    store = UpdateStore(P, K, with_fishers=False, path=path)
    for k in range(K - 1):
        assert store.put(torch.full((P,), float(round)), None, 1, k)
    return store


@pytest.mark.parametrize("in_file", [False, True])
def test_aggregation_ends_a_round(in_file, tmp_path):
    store = filled(1, tmp_path / "round.store" if in_file else None)
    w = torch.zeros(P)
    store.reject("broken", "it sent nothing")
    for _ in range(2):  # the round can be looked at by several rules
        assert (FedAvg().aggregate(w, store).params == 1).all()
    assert store.aggregated
    assert len(store) == K - 1
    if in_file:
        store.close()
        store = UpdateStore.open(tmp_path / "round.store", "r+")
        assert store.aggregated
    for k in range(2):
        assert store.put(torch.full((P,), 2.0), None, 1, k)
    assert not store.aggregated
    assert store.clients == (0, 1)
    assert store.rejected == {}
    assert (CoordinateMedian().aggregate(w, store).params == 2).all()


def test_a_round_that_failed_goes_on():
    store = filled(1)
    with pytest.raises(ValueError, match="fishers must be given"):
        FDCR().aggregate(torch.zeros(P), store)
    assert store.put(torch.ones(P), None, 1, "late")
    assert len(store) == K


def test_what_arrives_while_a_round_is_aggregated_belongs_to_the_next_one():
    store = filled(1)

    class Slow(FedAvg):
        def combine(self, global_params, clients, weights):
            if "late" not in store:
                assert store.put(torch.full((P,), 7.0), None, 1, "late")
            return super().combine(global_params, clients, weights)

    assert (Slow().aggregate(torch.zeros(P), store).params == 1).all()
    assert store.put(torch.full((P,), 9.0), None, 1, 0)
    assert set(store.clients) == {"late", 0}
    assert (FedAvg().aggregate(torch.zeros(P), store).params == 8).all()


def test_states_need_the_state_that_was_sent():
    model = nn.Linear(3, 2)
    store = StateStore(model, 4, with_fishers=False)
    other = copy.deepcopy(model)
    assert store.put_state(other, None, 1, 0)
    state, _ = store.aggregate(FedAvg())
    with pytest.raises(RuntimeError, match=r"the round was aggregated: clear\(state\) begins the next one"):
        store.put_state(other, None, 1, 0)
    with pytest.raises(RuntimeError, match="the round was aggregated"):
        store.reject(1, "it sent nothing")
    store.clear(state)
    assert store.put_state(other, None, 1, 0)


def test_who_comes_while_the_round_ends_begins_no_other_one(monkeypatch):
    model = nn.Linear(3, 2)
    store = StateStore(model, 4, with_fishers=False)
    assert store.put_state(model, None, 1, 0)
    store.aggregate(FedAvg())
    monkeypatch.setattr(store, "_in_this_round", lambda client: client)  # it was still open when the client looked
    with pytest.raises(RuntimeError, match="the round was aggregated"):
        store.put_state(model, None, 1, 1)
    assert store.updates.aggregated
    assert store.updates.clients == (0,)


def test_what_a_client_sent_is_there_as_soon_as_it_is_accepted(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    store, other = StateStore(model, 4, with_fishers=False), copy.deepcopy(model)
    other[1].running_mean += 2
    put, seen = store.updates.put, []

    def aggregated_at_once(*arguments, **options):
        accepted = put(*arguments, **options)
        seen.append(store.aggregate(FedAvg())[0])
        return accepted

    monkeypatch.setattr(store.updates, "put", aggregated_at_once)
    assert store.put_state(other, None, 1, 0)
    assert torch.equal(seen[0]["1.running_mean"], other[1].running_mean)


def test_a_state_that_cannot_be_copied_changes_nothing():
    class Unique:
        def __deepcopy__(self, memo):
            raise TypeError("there is but one")

    first = {"weight": torch.ones(3), "extra": "text"}
    store = StateStore(first, 2, with_fishers=False)
    assert store.put_state(first, None, 1, 0)
    with pytest.raises(TypeError, match="there is but one"):
        store.clear({"weight": torch.zeros(3), "extra": Unique()})
    state, _ = store.aggregate(FedAvg())
    assert state["extra"] == "text"
    assert torch.equal(state["weight"], first["weight"])


def test_states_under_ids_of_other_types():
    model = nn.Linear(3, 2)
    store = StateStore(model, 3, with_fishers=False)
    for client in (torch.tensor(4), np.int64(5)):
        assert store.put_state(copy.deepcopy(model), None, 1, client)
    assert store.aggregate(FedAvg())[1].kept_clients == [4, 5]
    store.clear(model)
    with pytest.raises(TypeError, match="client ids must be strings or integers"):
        store.put_state(model, None, 1, None)


def test_states_in_place_of_updates_are_noticed():
    model = nn.Linear(9, 5)
    layout = ParamLayout.from_module(model)
    w = layout.flatten(model)
    store = UpdateStore(layout, K, with_fishers=False)
    for k in range(3):
        store.put({n: p + 0.01 * torch.randn_like(p) for n, p in model.state_dict().items()}, None, 1, k)
    with pytest.warns(UserWarning, match="are they states w_k instead of updates"):
        FedAvg().aggregate(w, store)
    assert not store.put(model, None, 1, "module")
    assert "put_state takes states" in store.rejected["module"]


def test_all_forms_of_a_state_are_the_same(recwarn):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    client = copy.deepcopy(model)
    with torch.no_grad():
        for p in client.parameters():
            p.add_(torch.randn_like(p))
    layout = ParamLayout.from_module(model)
    expected = client.state_dict()
    forms = {
        "module": client,
        "data parallel": nn.DataParallel(client),
        "arrays": {name: value.numpy() for name, value in expected.items()},
        "module.": {f"module.{name}": value for name, value in expected.items()},
        "_orig_mod.": {f"_orig_mod.{name}": value for name, value in expected.items()},
        "vector": layout.flatten(client),
        "array": layout.flatten(client).numpy(),
        "sequence": list(expected.values()),
    }
    for name, form in forms.items():
        store = StateStore(model, 1, with_fishers=False)
        assert store.put_state(form, None, 1, name), store.rejected
        state, _ = store.aggregate(FedAvg())
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    state = aggregate_state_dicts(wrapped, [expected], None, [1], rule=FedAvg(), layout=layout)
    assert list(state) == list(wrapped)
    assert not recwarn.list


def test_ids_and_counts_of_numpy_and_torch():
    store = UpdateStore(P, 9, with_fishers=False)
    for client, count in ((np.int64(3), np.array([5])), (torch.tensor(4), torch.tensor([5])), (np.str_("a"), 5)):
        assert store.put(torch.ones(P), None, count, client)
    assert [type(client) for client in store.clients] == [int, int, str]
    assert store.put(torch.ones(P), None, 1)  # the number of earlier calls, 3, is another client's
    assert store.clients == (3, 4, "a", 5)
    for count in ("5", b"5", None, np.ones(2)):
        assert not store.put(torch.ones(P), None, count, "text")
    with pytest.raises(TypeError, match="client ids must be"):
        store.put(torch.ones(P), None, 1, [1])
    rule = CoalitionFDCR()
    rule.aggregate(torch.zeros(P), torch.randn(4, P), torch.rand(4, P), [1] * 4, client_ids=list(np.arange(4)))
    assert rule.state.clients == [0, 1, 2, 3]


def test_a_fisher_that_nobody_keeps_is_noted_once():
    store = UpdateStore(P, 2, with_fishers=False)
    with pytest.warns(UserWarning, match="the store keeps no Fishers"):
        assert store.put(torch.ones(P), torch.ones(P), 1, 0)


def test_what_a_store_is_made_of():
    layout = ParamLayout.from_module(nn.Linear(3, 2))
    assert UpdateStore(layout, 4, "bfloat16").dtype == torch.bfloat16
    assert UpdateStore(layout, 4).put(list(nn.Linear(3, 2).parameters()), torch.rand(8), 1)
    with pytest.raises(TypeError, match="such as 'bfloat16', got 'bf16'"):
        UpdateStore(3, 4, "bf16")
    with pytest.raises(TypeError, match="num_params must be an integer"):
        UpdateStore(3.5, 4)
    with pytest.raises(TypeError, match="a store is not copied"):
        copy.deepcopy(UpdateStore(3, 4))


def test_rounds_in_lists_and_arrays_are_those_of_matrices():
    w, updates, fishers = torch.randn(P), torch.randn(K, P), torch.rand(K, P)
    n = list(range(1, K + 1))
    expected = FDCR().aggregate(w, updates, fishers, n)
    for form in (list, lambda x: x.numpy(), lambda x: list(x.numpy())):
        result = FDCR().aggregate(w.numpy(), form(updates), form(fishers), n)
        torch.testing.assert_close(result.params, expected.params)
        assert torch.equal(result.kept, expected.kept)
    broken = [*updates[:-1], torch.ones(3)]
    assert list(FedAvg().aggregate(w, broken, None, n).rejected) == [K - 1]
    expected = TrimmedMean(num_byzantine=1).aggregate(w, updates, None, n).params
    assert torch.equal(TrimmedMean(num_byzantine=1).aggregate(w, updates).params, expected)
    assert torch.equal(TrimmedMean(num_byzantine=0.2).aggregate(w, updates).params, expected)
    with pytest.raises(TypeError, match="sample counts are the next argument"):
        FedAvg().aggregate(w, updates, n)
    with pytest.raises(TypeError, match=r"its aggregate\(rule\) takes the rule"):
        FedAvg().aggregate(w, StateStore(nn.Linear(3, 2), 2))


def test_shares_of_byzantine_clients():
    w, updates = torch.zeros(P), torch.randn(5, P)
    with pytest.raises(ValueError, match=r"needs at least 9 clients, got 5: take a smaller number, or a share"):
        MultiKrum(num_byzantine=3).aggregate(w, updates)
    assert MultiKrum(num_byzantine=0.2).aggregate(w, updates).kept.sum() == 4
    with pytest.raises(ValueError, match=r"or a share below 0\.5"):
        MultiKrum(num_byzantine=0.5)
    with pytest.raises(TypeError, match="server_update must be a function"):
        FLTrust(server_update=torch.ones(P))


@pytest.mark.parametrize("rule", [CoalitionFDCR(), FoolsGold()])
def test_a_rule_is_one_experiments(rule):
    fresh = type(rule)()
    assert rule == fresh
    fishers = torch.rand(K, P)
    rule.aggregate(torch.zeros(P), torch.randn(K, P), fishers, [1] * K)
    assert rule != fresh
    assert "clients=6" in repr(rule)
    with pytest.raises(ValueError, match=r"reset\(\) forgets"):
        rule.aggregate(torch.zeros(P + 1), torch.randn(K, P + 1), torch.rand(K, P + 1), [1] * K)
    restored = fresh.with_memory(rule.memory())
    assert restored == rule
    rule.reset()
    assert rule == fresh


def test_results_are_short_to_read():
    updates = torch.randn(30, P)
    updates[3] = torch.nan
    result = MultiKrum(num_byzantine=2).aggregate(torch.zeros(P), updates)
    assert 3 not in [*result.kept_clients, *result.dropped_clients]
    assert sorted([*result.kept_clients, *result.dropped_clients, 3]) == list(range(30))
    assert repr(result).startswith("AggregationResult(params=[40] float32, kept=")
    assert "rejected=1 [3: the update is not finite" in repr(result)
    assert len(repr(result)) < 400


def test_a_client_that_sent_twice_and_was_dropped_is_dropped():
    store = UpdateStore(P, K, with_fishers=False)
    for k in range(5):
        assert store.put(torch.full((P,), 1e6) if k == 0 else torch.randn(P), None, 1, k)
    assert not store.put(torch.zeros(P), None, 1, 0)
    result = MultiKrum(num_byzantine=1).aggregate(torch.zeros(P), store)
    assert list(result.rejected) == result.dropped_clients == [0]


def test_rejected_clients_are_named_where_no_result_is_returned():
    model = nn.Linear(3, 2)
    states = [model.state_dict(), {"weight": torch.zeros(2, 3)}]
    with pytest.warns(UserWarning, match="1 of 2 clients were rejected: client 1: .*missing parameters: bias"):
        aggregate_state_dicts(model.state_dict(), states, None, [1, 1], rule=FedAvg())
