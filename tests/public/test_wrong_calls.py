"""Wrong calls of the public interface: each is an error that names the argument, and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fdcr_fast import FedAvg, ParamLayout, StateStore, UpdateStore, aggregate_state_dicts
from tests.support.public_rounds import assert_same_result, bits, rules_and_rounds

ERRORS = (TypeError, ValueError)


def with_(**changes):
    return lambda arguments: {**arguments, **{name: change(arguments) for name, change in changes.items()}}


def changed(name, change):
    return lambda arguments: {**arguments, name: change(arguments[name])}


# What can be wrong with a call of ``rule.aggregate``, and the argument that the message must name.
ANY_RULE = {
    "fewer global parameters": (changed("global_params", lambda w: w[:-1]), "global_params"),
    "more global parameters": (changed("global_params", lambda w: torch.cat([w, w])), "global_params"),
    "a row of global parameters": (changed("global_params", lambda w: w[None]), "global_params"),
    "global parameters of NaN": (changed("global_params", lambda w: w * math.nan), "global_params"),
    "integer global parameters": (changed("global_params", lambda w: w.long()), "global_params"),
    "no global parameters": (changed("global_params", lambda w: None), "global_params"),
    "a state dict": (changed("global_params", lambda w: {"weight": w}), "global_params"),
    "a module": (changed("global_params", lambda w: nn.Linear(2, 2)), "global_params"),
    "complex global parameters": (changed("global_params", lambda w: w.to(torch.complex64)), "global_params"),
    "global parameters in text": (changed("global_params", lambda w: "model.pt"), "global_params"),
    "updates transposed": (changed("updates", lambda x: x.T), "updates|num_samples"),
    "updates of one client": (changed("updates", lambda x: x[0]), "updates"),
    "updates in a stack": (changed("updates", lambda x: x[None]), "updates"),
    "integer updates": (changed("updates", lambda x: x.long()), "updates"),
    "boolean updates": (changed("updates", lambda x: x > 0), "updates"),
    "complex updates": (changed("updates", lambda x: x.to(torch.complex64)), "updates"),
    "no updates": (changed("updates", lambda x: None), "updates"),
    "updates by client": (changed("updates", lambda x: dict(enumerate(x))), "updates"),
    "updates in a generator": (changed("updates", lambda x: iter(x)), "updates"),
    "an array of objects": (changed("updates", lambda x: np.full(x.shape, None)), "updates"),
    "updates of nobody": (changed("updates", lambda x: x[:0]), "updates|client|fishers"),
    "an empty list of updates": (changed("updates", lambda x: []), "updates|client|fishers"),
    "global parameters and updates swapped": (
        with_(global_params=lambda a: a["updates"], updates=lambda a: a["global_params"]),
        "global_params|updates",
    ),
    "fewer ids": (changed("client_ids", lambda ids: ids[:-1]), "client ids|client_ids"),
    "more ids": (changed("client_ids", lambda ids: [*ids, "one more"]), "client ids|client_ids"),
    "an id twice": (changed("client_ids", lambda ids: [*ids[:-2], 1, np.int64(1)]), "client ids|client_ids"),
    "a tensor's id twice": (
        changed("client_ids", lambda ids: [*ids[:-2], torch.tensor(1), 1]),
        "client ids|client_ids",
    ),
    "a text's id twice": (changed("client_ids", lambda ids: [*ids[:-2], "a", np.str_("a")]), "client ids|client_ids"),
    "ids without a hash": (changed("client_ids", lambda ids: [[k] for k in range(len(ids))]), "client ids|client_ids"),
    "an id that is NaN": (changed("client_ids", lambda ids: [*ids[:-2], {}, 3]), "client ids|client_ids"),
    "a number of ids": (changed("client_ids", lambda ids: len(ids)), "client ids|client_ids"),
    "an unknown on_invalid": (with_(on_invalid=lambda a: "ignore"), "on_invalid"),
    "an unknown on_empty": (with_(on_empty=lambda a: None), "on_empty"),
    "a shard that is none": (with_(shard=lambda a: 2), "shard"),
    "a store of another size": (
        lambda a: {"global_params": a["global_params"], "updates": stored(a, lambda w: torch.cat([w, w]))},
        "global_params",
    ),
    "a store and Fishers": (with_(updates=lambda a: stored(a)), "store"),
    "a store and counts": (
        lambda a: {**a, "updates": stored(a), "fishers": None, "client_ids": None},
        "store",
    ),
    "a store and ids": (
        lambda a: {**a, "updates": stored(a), "fishers": None, "num_samples": None},
        "store",
    ),
    "an empty store": (
        lambda a: {"global_params": a["global_params"], "updates": UpdateStore(len(a["global_params"]), 3)},
        "store",
    ),
    "a StateStore": (
        lambda a: {"global_params": a["global_params"], "updates": StateStore(nn.Linear(2, 2), 3)},
        "aggregate",
    ),
}
TAKES_FISHERS = {
    "no Fishers": (changed("fishers", lambda x: None), "fishers"),
    "Fishers transposed": (changed("fishers", lambda x: x.T), "fishers"),
    "fewer Fishers": (changed("fishers", lambda x: x[1:]), "fishers"),
    "shorter Fishers": (changed("fishers", lambda x: x[:, 1:]), "fishers"),
    "integer Fishers": (changed("fishers", lambda x: x.long()), "fishers"),
    "Fishers by client": (changed("fishers", lambda x: dict(enumerate(x))), "fishers"),
    "one Fisher for all": (changed("fishers", lambda x: x[0]), "fishers"),
    "counts in the place of Fishers": (with_(fishers=lambda a: a["num_samples"]), "fishers"),
    "updates and Fishers swapped": (
        with_(updates=lambda a: a["fishers"], fishers=lambda a: a["updates"]),
        "Fisher has negative entries",
    ),
    "negative Fishers": (changed("fishers", lambda x: -x), "Fisher has negative entries"),
    "a store without Fishers": (
        lambda a: {"global_params": a["global_params"], "updates": stored(a, with_fishers=False)},
        "fishers",
    ),
}
WEIGHS = {
    "fewer counts": (changed("num_samples", lambda n: n[1:]), "num_samples"),
    "more counts": (changed("num_samples", lambda n: [*n, 1]), "num_samples"),
    "counts in a row": (changed("num_samples", lambda n: [n]), "num_samples"),
    "counts in text": (changed("num_samples", lambda n: [str(k) for k in n]), "num_samples"),
    "one count in text": (changed("num_samples", lambda n: [*n[:-1], "7"]), "num_samples"),
    "one count missing": (changed("num_samples", lambda n: [*n[:-1], None]), "num_samples"),
    "one count of all": (changed("num_samples", lambda n: 7), "num_samples"),
    "counts by client": (changed("num_samples", lambda n: dict(enumerate(n))), "num_samples"),
    "complex counts": (changed("num_samples", lambda n: torch.tensor(n) * 1j), "num_samples"),
    "no counts": (changed("num_samples", lambda n: None), "num_samples"),
    "counts in the place of Fishers, and none": (
        lambda a: {**a, "fishers": a["num_samples"], "num_samples": None},
        "num_samples|fishers",
    ),
    "negative counts": (changed("num_samples", lambda n: [-k for k in n]), "sample count"),
}


def stored(arguments, wider=lambda w: w, with_fishers=True):
    K = len(arguments["updates"])
    store = UpdateStore(len(wider(arguments["global_params"])), K, with_fishers=with_fishers)
    for k in range(K):
        update, fisher = (wider(arguments[name][k]) for name in ("updates", "fishers"))
        assert store.put(update, fisher if with_fishers else None, arguments["num_samples"][k], k)
    return store


def wrong_calls(rule):
    return {
        **ANY_RULE,
        **(TAKES_FISHERS if rule.needs_fishers else {}),
        **(WEIGHS if rule.weighs_samples else {}),
    }


@given(given=rules_and_rounds(spare=1), data=st.data())
def test_a_wrong_call_is_an_error_that_names_the_argument(given, data):
    make, round = given
    rule, expected = make(), round.aggregate(make())
    for _ in range(data.draw(st.integers(0, 1), "earlier rounds")):
        round.aggregate(rule)
        expected = round.aggregate(make().with_memory(rule.memory()))
    table = wrong_calls(rule)
    wrong, named = table[data.draw(st.sampled_from(sorted(table)), "wrong")]
    arguments = wrong(round.arguments())
    before, memory = bits(arguments), rule.memory()
    with pytest.raises(ERRORS, match=named):
        rule.aggregate(**arguments)
    assert bits(arguments) == before
    assert rule.memory() == memory
    assert_same_result(round.aggregate(rule), expected)


# --- whole states

# What can be wrong with a call of ``aggregate_state_dicts``.
STATE_CALLS = {
    "one state as the clients'": ({"client_states": lambda r: r.model.state_dict()}, "num_samples|fishers|the state"),
    "one module as the clients'": ({"client_states": lambda r: r.model}, "num_samples|fishers|missing"),
    "no states": ({"client_states": lambda r: None}, "client_states"),
    "a number of states": ({"client_states": lambda r: 3}, "client_states"),
    "states of nobody": ({"client_states": lambda r: []}, "at least one client"),
    "no global state": ({"global_state": lambda r: None}, "state dict or a module"),
    "a list as the global state": ({"global_state": lambda r: list(r.model.parameters())}, "state dict or a module"),
    "a vector as the global state": ({"global_state": lambda r: r.w}, "state dict or a module"),
    "another model": ({"global_state": lambda r: nn.Linear(2, 2)}, "missing parameters"),
    "a global state of NaN": (
        {"global_state": lambda r: {name: p * math.nan for name, p in r.model.named_parameters()}},
        "global_params|fishers",
    ),
    "Fishers transposed": ({"fishers": lambda r: fishers_of(r).T}, "fishers"),
    "one Fisher for all": ({"fishers": lambda r: fishers_of(r)[0]}, "fishers"),
    "Fishers by name": ({"fishers": lambda r: r.layout.unflatten(fishers_of(r)[0])}, "fishers"),
    "Fishers of others": ({"fishers": lambda r: {"nobody": fishers_of(r)[0]}}, "fishers"),
    "a number as Fishers": ({"fishers": lambda r: 3}, "fishers"),
    "one count": ({"num_samples": lambda r: 3}, "num_samples"),
    "fewer counts": ({"num_samples": lambda r: [1]}, "num_samples"),
    "counts in text": ({"num_samples": lambda r: ["3"] * len(r.uploads)}, "sample count"),
    "counts of others": ({"num_samples": lambda r: {"nobody": 3}}, "num_samples"),
    "a number of ids": ({"client_ids": lambda r: len(r.uploads)}, "client ids"),
    "fewer ids": ({"client_ids": lambda r: ["a"]}, "client ids"),
    "one id twice": ({"client_ids": lambda r: ["a"] * len(r.uploads)}, "client ids"),
    "ids without a hash": ({"client_ids": lambda r: [[]] * len(r.uploads)}, "client ids"),
    "an unknown on_invalid": ({"on_invalid": lambda r: "ignore"}, "on_invalid"),
    "an unknown on_empty": ({"on_empty": lambda r: "ignore"}, "on_empty"),
    "a rule's name": ({"rule": lambda r: "FDCR"}, "rule"),
    "a rule's class": ({"rule": lambda r: FedAvg}, "rule"),
    "another model's layout": ({"layout": lambda r: ParamLayout(("x",), ((2,),))}, "missing parameters: x"),
}


def fishers_of(round):
    return torch.stack([upload.fisher for upload in round.uploads])


@given(given=rules_and_rounds(spare=1), data=st.data())
def test_a_wrong_call_with_states_is_an_error_that_names_the_argument(given, data):
    make, round = given
    rule = make()
    names = [name for name, (changes, _) in STATE_CALLS.items() if rule.needs_fishers or "fishers" not in changes]
    name = data.draw(st.sampled_from(names), "wrong")
    changes, named = STATE_CALLS[name]
    arguments: dict[str, Any] = {
        "global_state": round.model,
        "client_states": [round.state(upload) for upload in round.uploads],
        "fishers": list(fishers_of(round)),
        "num_samples": [upload.count for upload in round.uploads],
        "rule": rule,
    }
    wrong = {**arguments, **{argument: change(round) for argument, change in changes.items()}}
    before, memory = bits(wrong), rule.memory()
    with pytest.raises(ERRORS, match=named):
        aggregate_state_dicts(**wrong)
    assert bits(wrong) == before
    assert rule.memory() == memory
    state, _ = aggregate_state_dicts(**arguments, return_result=True)
    torch.testing.assert_close(round.layout.flatten(state), round.aggregate(make()).params, rtol=2e-6, atol=2e-6)
