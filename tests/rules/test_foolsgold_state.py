from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch

from fdcr_fast import FedAvg, FoolsGold, FoolsGoldState


def aggregate(rule, ids, seed=0, P=6):
    updates = torch.randn(len(ids), P, generator=torch.Generator().manual_seed(seed))
    return rule.aggregate(torch.zeros(P), updates, None, [1] * len(ids), client_ids=ids), updates


def test_what_is_remembered_survives_a_restart():
    rule = FoolsGold()
    _, first = aggregate(rule, ["a", 1, "c"])
    _, second = aggregate(rule, [1, "d"], seed=1)
    again = rule.with_memory(rule.memory())
    assert again.state.clients == rule.state.clients == ["a", 1, "c", "d"]
    assert torch.equal(again.state.history, torch.stack([first[0], first[1] + second[0], first[2], second[1]]))
    a, b = (aggregate(r, ["a", "d", "e"], seed=2)[0] for r in (rule, again))
    assert torch.equal(a.params, b.params)


def test_clients_who_left_are_forgotten():
    rule = FoolsGold()
    _, updates = aggregate(rule, ["a", "b", "c"])
    rule.state.forget(["b", "nobody"])
    assert rule.state.clients == ["a", "c"]
    assert torch.equal(rule.state.history, updates[[0, 2]])


def test_histories_stay_finite():
    rule = FoolsGold()
    for _ in range(3):
        rule.aggregate(torch.zeros(2), torch.tensor([[3e38, -3e38], [1.0, 1.0]]), None, [1, 1])
    assert rule.state.history.isfinite().all()


def test_rounds_that_do_not_fit_are_named():
    rule = FoolsGold()
    aggregate(rule, ["a"])
    with pytest.raises(ValueError, match="the state compares 6 parameters, the round has 7"):
        aggregate(rule, ["a"], P=7)
    with pytest.raises(ValueError, match="strings or integers"):
        aggregate(FoolsGold(), [("a", 1)])


def archive(header, history):
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), history=history)
    return buffer.getvalue()


GOOD = {"format": "fdcr_fast.FoolsGoldState 1", "clients": ["a"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a FoolsGold state"),
        (b"\x00" * 40, "not a FoolsGold state"),
        (pickle.dumps({}), "not a FoolsGold state"),
        (archive(GOOD, np.array([[object()]])), "not a FoolsGold state"),
        (archive({**GOOD, "format": "2"}, np.zeros((1, 2), np.float32)), "format"),
        (archive([], np.zeros((1, 2), np.float32)), "format"),
        (archive({**GOOD, "clients": ["a", "a"]}, np.zeros((2, 2), np.float32)), "twice"),
        (archive({**GOOD, "clients": [1.5]}, np.zeros((1, 2), np.float32)), "strings or integers"),
        (archive(GOOD, np.zeros((2, 2), np.float32)), "history"),
        (archive(GOOD, np.zeros((1, 2))), "history"),
        (archive(GOOD, np.full((1, 2), np.nan, np.float32)), "not finite"),
    ],
)
def test_what_is_no_state_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        FoolsGoldState.from_bytes(data)


def test_rules_without_memory_take_none():
    assert FedAvg().with_memory(FedAvg().memory()) == FedAvg()
    with pytest.raises(ValueError, match="FedAvg remembers nothing"):
        FedAvg().with_memory(b"x")
