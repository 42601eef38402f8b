from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fdcr_fast.layout import ParamLayout
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.state_dicts.aggregate import aggregate_state_dicts
from tests.support.federation import COUNTS, K, network


class Federation:
    """States of K clients around a model, and their Fishers in every form."""

    def __init__(self, model=None, seed=0):
        torch.manual_seed(seed)
        self.model = network() if model is None else model
        self.state = self.model.state_dict()
        self.layout = ParamLayout.from_module(self.model)
        self.clients = []
        for k in range(K):
            state = copy.deepcopy(self.state)  # keeps sharing, as a client's own state_dict() does
            for value in {value.data_ptr(): value for value in state.values()}.values():
                value += torch.rand(value.shape).to(value.dtype) if value.is_floating_point() else 10 * k
            self.clients.append(state)
        self.fishers = [torch.rand(self.layout.numel) for _ in range(K)]

    def expected(self, rule):
        w = self.layout.flatten(self.state)
        updates = torch.stack([self.layout.flatten(state) - w for state in self.clients])
        return rule.aggregate(w, updates, torch.stack(self.fishers), COUNTS)

    def aggregate(self, **options):
        arguments = {
            "global_state": self.state,
            "client_states": self.clients,
            "fishers": self.fishers,
            "num_samples": COUNTS,
            "return_result": True,
        }
        return aggregate_state_dicts(**{**arguments, **options})


@pytest.mark.parametrize("rule", [None, FDCR(partition="last", cluster="kmeans"), FedAvg()])
def test_parameters_go_through_the_rule_and_buffers_through_the_mean(rule):
    federation = Federation()
    state, result = federation.aggregate(rule=rule)
    expected = federation.expected(rule or FDCR())
    assert torch.equal(result.kept, expected.kept)
    torch.testing.assert_close(federation.layout.flatten(state), expected.params)
    for name in ("1.running_mean", "1.running_var"):
        mean = sum(w * c[name].double() for w, c in zip(expected.weights, federation.clients, strict=True))
        torch.testing.assert_close(state[name], mean.float())
    batches = sum(w.item() * 10 * k for k, w in enumerate(expected.weights))
    assert state["1.num_batches_tracked"].item() == round(batches)


def test_the_result_is_a_state_like_the_global_one():
    federation = Federation()
    before = copy.deepcopy(federation.state)
    state = federation.aggregate(return_result=False)
    assert list(state) == list(federation.state)
    for name, value in federation.state.items():
        assert state[name].dtype == value.dtype
        assert state[name].shape == value.shape
    federation.model.load_state_dict(state)
    inputs = {value.data_ptr() for s in (federation.state, *federation.clients) for value in s.values()}
    assert not inputs & {value.data_ptr() for value in state.values()}
    state["0.weight"].zero_()
    assert not torch.equal(state["0.bias"], torch.zeros(2))
    assert before.keys() == state.keys()


def test_all_forms_of_the_inputs_agree():
    federation = Federation()
    reference, result = federation.aggregate()
    ids = ["a", "b", "c", "d", "e", "f"]
    backwards = list(reversed(range(K)))
    named = [federation.layout.unflatten(fisher) for fisher in federation.fishers]
    forms = [
        {"fishers": torch.stack(federation.fishers), "num_samples": torch.tensor(COUNTS)},
        {"fishers": [fisher.numpy() for fisher in federation.fishers]},
        {"fishers": named},
        {"layout": federation.layout},
        {"client_ids": ids},
        {"client_states": [{name: v.numpy() for name, v in s.items()} for s in federation.clients]},
        {
            "client_states": dict(zip(ids, federation.clients, strict=True)),
            "fishers": {ids[k]: named[k] for k in backwards},
            "num_samples": {ids[k]: COUNTS[k] for k in backwards},
        },
    ]
    for form in forms:
        state, other = federation.aggregate(**form)
        assert torch.equal(other.kept, result.kept)
        for name, value in reference.items():
            torch.testing.assert_close(state[name], value)


def test_models_without_buffers_need_no_layout():
    federation = Federation(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    state, result = federation.aggregate()
    torch.testing.assert_close(federation.layout.flatten(state), federation.expected(FDCR()).params)
    assert result.rejected == {}


def test_fishers_of_all_entries_make_all_entries_parameters():
    state = {"a": torch.zeros(2), "b.running_mean": torch.zeros(2)}
    clients = [{name: value + k + 1 for name, value in state.items()} for k in range(2)]
    fishers = [torch.arange(4.0)] * 2
    result = aggregate_state_dicts(state, clients, fishers, [1, 1])
    assert (result["b.running_mean"] > 1.5 * 1.3).all()  # rescaled, unlike a mean


def test_fedavg_needs_neither_fishers_nor_layout():
    federation = Federation()
    state, _ = federation.aggregate(fishers=None, rule=FedAvg())
    torch.testing.assert_close(federation.layout.flatten(state), federation.expected(FedAvg()).params)


def test_shared_parameters_follow_one_another():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    federation = Federation(model)
    for options in ({}, {"layout": federation.layout}):
        state, _ = federation.aggregate(**options)
        assert state["1.weight"] is state["0.weight"]
        torch.testing.assert_close(federation.layout.flatten(state), federation.expected(FDCR()).params)
    second = ParamLayout(
        ("1.weight", *federation.layout.names[1:]),
        (federation.layout.shapes[0], *federation.layout.shapes[1:]),
    )
    state, _ = federation.aggregate(layout=second)
    assert state["1.weight"] is state["0.weight"]


def test_half_precision_is_aggregated_in_float32():
    federation = Federation(network().to(torch.bfloat16))
    state, _ = federation.aggregate()
    w = federation.layout.flatten(federation.state, torch.float32)
    updates = torch.stack([federation.layout.flatten(s, torch.float32) - w for s in federation.clients])
    expected = FDCR().aggregate(w, updates, torch.stack(federation.fishers), COUNTS)
    assert torch.equal(federation.layout.flatten(state), expected.params.bfloat16())


def test_what_is_no_number_stays_as_it_is():
    federation = Federation()
    extra = {
        "mask": torch.tensor([True, False]),
        "phase": torch.tensor([1j]),
        "_extra_state": {"version": [1]},
    }
    federation.state = {**federation.state, **extra}
    state, result = federation.aggregate()
    assert result.rejected == {}
    assert torch.equal(state["mask"], extra["mask"])
    assert torch.equal(state["phase"], extra["phase"])
    assert state["_extra_state"] == {"version": [1]}
    assert state["_extra_state"]["version"] is not extra["_extra_state"]["version"]


BAD_STATES = {
    "missing parameter": (lambda s: s.pop("3.bias"), "missing parameters: 3.bias"),
    "missing buffer": (lambda s: s.pop("1.running_var"), "missing buffer: 1.running_var"),
    "misshaped parameter": (
        lambda s: s.update({"3.bias": torch.zeros(4)}),
        r"3.bias (4,), expected (3,)",
    ),
    "misshaped buffer": (
        lambda s: s.update({"1.running_mean": torch.zeros(1)}),
        "has shape [1], expected [2]",
    ),
    "NaN parameter": (lambda s: s.update({"3.bias": torch.full((3,), torch.nan)}), "update is not finite"),
    "NaN buffer": (
        lambda s: s.update({"1.running_var": torch.full((2,), torch.nan)}),
        "1.running_var is not finite",
    ),
    "no tensor": (lambda s: s.update({"3.bias": "none"}), "got str"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_is_rejected_and_the_others_aggregated(case):
    spoil, reason = BAD_STATES[case]
    federation = Federation()
    others = [k for k in range(K) if k != 2]
    expected, _ = federation.aggregate(
        client_states=[federation.clients[k] for k in others],
        fishers=[federation.fishers[k] for k in others],
        num_samples=[COUNTS[k] for k in others],
    )
    spoil(federation.clients[2])
    state, result = federation.aggregate()
    assert list(result.rejected) == [2]
    assert reason in result.rejected[2]
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_bad_fishers_and_counts_reject_their_client():
    federation = Federation()
    named = {k: federation.layout.unflatten(fisher) for k, fisher in enumerate(federation.fishers)}
    del named[1]["3.bias"], named[4]
    _, result = federation.aggregate(
        client_states=dict(enumerate(federation.clients)),
        fishers=named,
        num_samples={**dict(enumerate(COUNTS)), 5: 0},
    )
    assert sorted(result.rejected) == [1, 4, 5]
    assert "missing parameters: 3.bias" in result.rejected[1]
    assert "got NoneType" in result.rejected[4]
    assert "sample count" in result.rejected[5]
    flat = [*federation.fishers[:-1], torch.rand(3)]
    assert list(federation.aggregate(fishers=flat)[1].rejected) == [5]
    assert list(federation.aggregate(client_states=[None, *federation.clients[1:]])[1].rejected) == [0]


def test_one_client_cannot_choose_the_layout():
    federation = Federation()
    fishers = [{"3.bias": torch.rand(3)}, *federation.fishers[1:]]
    state, result = federation.aggregate(fishers=fishers)
    assert list(result.rejected) == [0]
    assert not torch.equal(state["0.weight"], federation.state["0.weight"])


def test_nobody_left_is_the_global_state():
    federation = Federation()
    for state in federation.clients:
        state["3.bias"] += torch.nan
    with pytest.raises(ValueError, match="none of 6 clients can be used: client 0: the update is not finite"):
        federation.aggregate()
    with pytest.warns(UserWarning, match="none of 6 clients can be used"):
        state, result = federation.aggregate(on_empty="keep")
    assert len(result.rejected) == K
    for name, value in federation.state.items():
        assert torch.equal(state[name], value)
        assert state[name].data_ptr() != value.data_ptr()


def test_the_dropped_do_not_reach_the_buffers():
    federation = Federation()
    for k in (0, 1):
        for name in federation.layout.names:
            federation.clients[k][name] += 20
        federation.clients[k]["1.running_mean"] += 1e6
    state, result = federation.aggregate(rule=FDCR(cluster="kmeans", norm_bound=None))
    assert not result.kept[:2].any()
    assert state["1.running_mean"].max() < 2


@pytest.mark.parametrize(
    ("name", "value"), [("1.running_mean", -1e9), ("1.running_var", 1e30), ("1.num_batches_tracked", 2**62)]
)
def test_buffers_of_unusual_size_move_nothing_far(name, value):
    federation = Federation()
    honest = torch.stack([client[name] for client in federation.clients[:-1]])
    federation.clients[-1][name] = torch.full_like(federation.clients[-1][name], value)
    for rule in (FDCR(), FDCR(cluster=None, norm_bound=None), FedAvg(norm_bound=100)):
        state, result = federation.aggregate(rule=rule)
        assert result.rejected == {}
        assert (honest.amin(0) <= state[name]).all()
        assert (state[name] <= honest.amax(0)).all()
    plain = federation.aggregate(rule=FedAvg())[0][name].double()
    torch.testing.assert_close(plain, torch.full_like(plain, value * COUNTS[-1] / sum(COUNTS)), rtol=1e-3, atol=30)


def test_buffers_that_are_zero_but_for_one_client():
    federation = Federation()
    for state in (federation.state, *federation.clients):
        state["1.running_mean"] = torch.zeros(2)
    federation.clients[0]["1.running_mean"] = torch.ones(2)
    assert federation.aggregate()[1].rejected == {}


def test_on_invalid_raises_with_name_and_reason():
    federation = Federation()
    federation.clients[3]["1.running_var"] *= torch.nan
    with pytest.raises(ValueError, match=r"client 3: buffer 1\.running_var is not finite"):
        federation.aggregate(on_invalid="raise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client_states": [], "fishers": [], "num_samples": []}, "at least one client"),
        ({"fishers": [torch.rand(5)]}, "expected fishers of 6 clients, got 1"),
        ({"num_samples": [1, 2]}, "expected num_samples of 6 clients, got 2"),
        ({"num_samples": {"x": 1}}, r"num_samples of clients without a state: \['x'\]"),
        ({"client_ids": [0] * K}, "different client ids"),
        ({"client_states": {0: {}}, "client_ids": [0]}, "do not give client_ids"),
        ({"fishers": None}, "fishers must be given"),
        ({"fishers": [torch.rand(7)] * K}, "give layout="),
        ({"fishers": [{"x": torch.rand(7)}] * K}, "global_state lacks: x"),
        ({"layout": ParamLayout(("x",), ((1,),))}, "missing parameters: x"),
    ],
)
def test_a_bad_call_says_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        Federation().aggregate(**options)


def test_numpy_counts():
    federation = Federation()
    reference, _ = federation.aggregate()
    state, _ = federation.aggregate(num_samples=np.array(COUNTS))
    assert all(torch.equal(state[name], value) for name, value in reference.items())
