"""What every rule inherits: the forms of a call, what is wrong with one, and how a rule of one's own is written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.rules.result import Selection
from fdcr_fast.store.update_store import UpdateStore
from tests.support.fdcr_rounds import random_round


def good():
    return {
        "global_params": torch.zeros(4),
        "updates": torch.rand(3, 4),
        "fishers": torch.rand(3, 4),
        "num_samples": [1, 2, 3],
    }


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"updates": torch.rand(12)}, ValueError, r"expected updates \[K, P\], got shape \[12\]"),
        ({"updates": torch.rand(1, 3, 4)}, ValueError, r"expected updates \[K, P\], got shape \[1, 3, 4\]"),
        (
            {"updates": torch.ones(3, 4, dtype=torch.int64)},
            TypeError,
            "floating-point updates .* got torch.int64",
        ),
        ({"updates": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, "floating-point updates"),
        ({"updates": "abc"}, TypeError, r"expected updates \[K, P\], K vectors or an UpdateStore, got str"),
        ({"updates": [torch.rand(4)]}, ValueError, "expected fishers of 1 clients like updates, got 3"),
        (
            {"global_params": {"w": torch.zeros(4)}},
            TypeError,
            r"\[P\] to be a torch.Tensor, got dict; .*aggregate_state_dicts",
        ),
        ({"fishers": None, "num_samples": None}, ValueError, "fishers must be given"),
        ({"on_empty": "ignore"}, ValueError, "on_empty must be one of"),
        (
            {"updates": torch.rand(0, 4), "fishers": torch.rand(0, 4), "num_samples": []},
            ValueError,
            "at least one",
        ),
        ({"updates": torch.rand(3, 0), "fishers": torch.rand(3, 0)}, ValueError, "at least one"),
        ({"fishers": torch.rand(2, 4)}, ValueError, r"expected fishers \[3, 4\] like updates, got \[2, 4\]"),
        ({"fishers": torch.rand(3, 5)}, ValueError, r"expected fishers \[3, 4\] like updates, got \[3, 5\]"),
        (
            {"fishers": torch.ones(3, 4, dtype=torch.bool)},
            TypeError,
            "floating-point fishers .* got torch.bool",
        ),
        (
            {"fishers": torch.rand(3, 4, device="meta")},
            ValueError,
            "fishers on the device of the updates, cpu, got meta",
        ),
        ({"fishers": None}, ValueError, "fishers must be given"),
        ({"num_samples": [1, 2]}, ValueError, r"expected num_samples \[3\], one per client, got shape \[2\]"),
        ({"num_samples": [[1, 2, 3]]}, ValueError, r"num_samples \[3\], one per client, got shape \[1, 3\]"),
        ({"num_samples": ["a", "b", "c"]}, TypeError, "num_samples to be 3 numbers"),
        ({"num_samples": None}, TypeError, "num_samples to be 3 numbers, got None"),
        (
            {"global_params": torch.zeros(5)},
            ValueError,
            r"expected global_params \[4\] like the updates, got \[5\]",
        ),
        (
            {"global_params": torch.zeros(2, 2)},
            ValueError,
            r"expected global_params \[P\], got shape \[2, 2\]",
        ),
        ({"global_params": torch.zeros(4, dtype=torch.int32)}, TypeError, "floating-point global_params"),
        (
            {"global_params": torch.zeros(4, device="meta")},
            ValueError,
            "global_params on the device of the updates",
        ),
        ({"global_params": torch.tensor([0, torch.nan, 0, 0])}, ValueError, "global_params are not finite"),
        ({"global_params": torch.tensor([0, torch.inf, 0, 0])}, ValueError, "global_params are not finite"),
        ({"client_ids": ["a", "b"]}, ValueError, "expected 3 different client ids"),
        ({"client_ids": ["a", "b", "a"]}, ValueError, "expected 3 different client ids"),
    ],
)
def test_a_bad_call_says_what_was_expected(wrong, error, message):
    with pytest.raises(error, match=message):
        FDCR().aggregate(**{**good(), **wrong})


def test_bad_calls_with_stores():
    store = UpdateStore(4, 2)
    with pytest.raises(ValueError, match="empty store"):
        FDCR().aggregate(torch.zeros(4), store)
    store.put(torch.rand(4), torch.rand(4), 1)
    with pytest.raises(TypeError, match="give the store alone"):
        FDCR().aggregate(torch.zeros(4), store, None, [1])
    with pytest.raises(ValueError, match=r"expected global_params \[4\]"):
        FDCR().aggregate(torch.zeros(3), store)
    without = UpdateStore(4, 2, with_fishers=False)
    without.put(torch.rand(4), None, 1)
    assert FedAvg().aggregate(torch.zeros(4), without).kept.all()
    with pytest.raises(ValueError, match="fishers must be given"):
        FDCR().aggregate(torch.zeros(4), without)


def test_numbers_of_samples_in_any_form():
    inputs = good()
    counts = [2.5, 1.0, 4.0]
    expected = FDCR().aggregate(**{**inputs, "num_samples": counts}).params
    for form in (
        tuple(counts),
        np.array(counts, dtype=np.float32),
        torch.tensor(counts),
        [torch.tensor(n) for n in counts],
    ):
        assert torch.equal(FDCR().aggregate(**{**inputs, "num_samples": form}).params, expected)


def test_client_ids_name_rows_and_reasons():
    inputs = good()
    inputs["updates"][1] = torch.nan
    result = FDCR().aggregate(**inputs, client_ids=["a", "b", "c"])
    assert result.clients == ("a", "b", "c")
    assert list(result.rejected) == ["b"]


def test_a_rule_of_ones_own_needs_only_select():
    @dataclasses.dataclass(frozen=True)
    class DropEven(AggregationRule):
        def select(self, clients):
            return Selection(torch.tensor([client % 2 == 1 for client in clients.clients]))

    problem = random_round(0, 5, 10)
    problem.updates[3] = torch.nan
    result = DropEven().aggregate(problem.w, problem.updates, None, problem.n)
    assert result.kept.tolist() == [False, True, False, False, False]
    assert result.labels.tolist() == [1, 0, 1, -1, 1]
    torch.testing.assert_close(result.params, problem.w + problem.updates[1])
    nobody = DropEven().aggregate(problem.w, problem.updates[:1], None, [1])
    assert torch.equal(nobody.params, problem.w)
