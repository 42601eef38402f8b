"""Stores between right and wrong calls: what they took in is what is aggregated, and a wrong call changes nothing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fdcr_fast import FedAvg, Krum, StateStore, UpdateStore, aggregate_state_dicts
from tests.support.public_rounds import assert_same_result, plain, rules_and_rounds

# What can be wrong with a call of a store that has the first client: the error, or that it is not accepted.
STORE_CALLS = {
    "an id without a hash": (lambda s, put, u: put(s, u, [1]), TypeError, "client ids"),
    "a tensor of ids": (lambda s, put, u: put(s, u, torch.arange(2)), TypeError, "client ids"),
    "a second contribution": (lambda s, put, u: put(s, u, u.client), None, "second contribution"),
    "an error that is recorded": (lambda s, put, u: s.reject([1], "it sent nothing"), TypeError, "client ids"),
    "the rule's name": (lambda s, put, u: aggregated(s, "FedAvg"), (TypeError, AttributeError), "rule|aggregate"),
    "a rule that needs more clients": (
        lambda s, put, u: aggregated(s, Krum(num_byzantine=3), u.update),
        ValueError,
        "num_byzantine|at least 9 clients",
    ),
    "another on_empty": (lambda s, put, u: aggregated(s, FedAvg(), u.update, on_empty="x"), ValueError, "on_empty"),
}
UPDATE_STORE_CALLS = {
    "a row that is taken": (lambda s, put, u: put(s, u, "new", row=0), ValueError, "row 0"),
    "a row that is none": (lambda s, put, u: put(s, u, "new", row=99), ValueError, "row 99"),
    "nobody removed": (lambda s, put, u: s.remove("nobody"), KeyError, "nobody"),
    "a replacement that is bad": (
        lambda s, put, u: s.put(u.update * math.nan, u.fisher, u.count, u.client, replace=True),
        None,
        "not finite",
    ),
    "fewer global parameters": (lambda s, put, u: aggregated(s, FedAvg(), u.update[1:]), ValueError, "global_params"),
}
NEED_A_ROW = ("a row that is taken", "a row that is none", "a replacement that is bad")
STATE_STORE_CALLS = {
    "no id": (lambda s, put, u: put(s, u, None), TypeError, "client ids"),
    "another model's state": (lambda s, put, u: s.clear(nn.Linear(2, 2)), ValueError, "missing parameters"),
    "no state": (lambda s, put, u: s.clear(None), TypeError, "state dict or a module"),
}


def aggregated(store, rule, w=None, **options):
    if isinstance(store, StateStore):
        return store.aggregate(rule, **options)
    return rule.aggregate(w, store, **options)


@given(given=rules_and_rounds(), data=st.data(), whole_states=st.booleans())
def test_wrong_calls_of_a_store_change_nothing(given, data, whole_states):
    make, round = given
    model, K = round.module(round.uploads[0]), len(round.uploads)
    model.load_state_dict(round.model.state_dict())  # the server's own, in which clients are trained later
    store = StateStore(model, K) if whole_states else UpdateStore(round.layout, K)
    table = {**STORE_CALLS, **(STATE_STORE_CALLS if whole_states else UPDATE_STORE_CALLS)}

    def put(store, upload, client, **options):
        if whole_states:
            model.load_state_dict(round.state(upload))
            return store.put_state(model, upload.fisher, upload.count, client)
        sent = upload.update.clone(), upload.fisher.clone()
        accepted = store.put(*sent, upload.count, client, **options)
        for vector in sent:
            vector.fill_(99)  # what was taken in is a copy
        return accepted

    rejected = {}
    for k, upload in enumerate(round.uploads):
        assert put(store, upload, upload.client)
        for name in data.draw(st.lists(st.sampled_from(sorted(table)), max_size=2), "wrong"):
            call, error, named = table[name]
            if k == K - 1 and name in NEED_A_ROW:
                continue
            if error is None:
                assert call(store, put, upload) is False
                rejected[plain(upload.client)] = named
            else:
                with pytest.raises(error, match=named):
                    call(store, put, upload)
    with pytest.raises(RuntimeError, match=f"capacity is {K}"):
        put(store, round.uploads[0], "one more")
    for client, reason in rejected.items():
        assert re.search(reason, store.rejected[client])
    expected = round.aggregate(make())
    if not whole_states:
        assert_same_result(make().aggregate(round.w, store), expected)
        for upload in reversed(round.uploads):  # the next round
            assert put(store, upload, upload.client)
        assert_same_result(make().aggregate(round.w, store), expected)
        return
    state, result = store.aggregate(make())
    assert_same_result(result, expected)
    ways = [round.state(upload) for upload in round.uploads], [upload.fisher for upload in round.uploads]
    fresh = aggregate_state_dicts(round.model, *ways, [upload.count for upload in round.uploads], rule=make())
    for name, value in fresh.items():
        torch.testing.assert_close(state[name], value, rtol=2e-6, atol=2e-6)
    with pytest.raises(RuntimeError, match="clear"):
        put(store, round.uploads[0], "late")
