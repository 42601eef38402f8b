"""Stores that take no memory: what becomes of tensors that are put, until they are aggregated."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fdcr_fast import FDCR, CoalitionFDCR, FedAvg, UpdateStore, ops

P, K = 9_100, 4


def borrowed(base=None, with_fishers=True):
    store, generator = UpdateStore(P, K, copy=False, with_fishers=with_fishers), torch.Generator().manual_seed(0)
    for k in range(K):
        update = torch.randn(P, generator=generator)
        fisher = torch.rand(P, generator=generator) if with_fishers else None
        assert store.put(update, fisher, 1, k, base=base)
    return store


@pytest.mark.parametrize("rule", [FDCR(), FedAvg(), CoalitionFDCR()], ids=lambda rule: type(rule).__name__)
def test_a_base_that_wants_gradients_has_none(rule):
    w = torch.linspace(-1, 1, P).requires_grad_()
    result = rule.aggregate(w, borrowed(w))
    assert not result.params.requires_grad
    expected = type(rule)().aggregate(w.detach(), borrowed(w.detach()))
    assert torch.equal(result.params, expected.params)


def test_raising_at_put_needs_copies():
    with pytest.raises(ValueError, match="not looked at by put"):
        UpdateStore(P, K, copy=False, on_invalid="raise")


def test_what_was_not_accepted_is_let_go():
    store, update = UpdateStore(P, K, copy=False), torch.randn(P)
    seen = weakref.ref(update)
    assert not store.put(update, torch.rand(P), 0, "without samples")
    del update
    gc.collect()
    assert seen() is None


def test_tensors_that_change_their_size_are_told():
    store = UpdateStore(P, 2, copy=False, with_fishers=False)
    pieces = [torch.ones(P), torch.ones(P)]
    for k, piece in enumerate(pieces):
        assert store.put(piece, None, 1, k)
    pieces[0].resize_(P - 50)
    pieces[1].resize_(P + 50)
    with pytest.raises(ValueError, match=f"the tensors of row 0 have .{P - 50}. numbers, expected {P}"):
        FedAvg().aggregate(torch.zeros(P), store)


@pytest.mark.parametrize("rule", [FDCR(), FedAvg()], ids=lambda rule: type(rule).__name__)
def test_memory_that_was_freed_is_told(rule):
    store, numbers = UpdateStore(P, K, copy=False, with_fishers=rule.needs_fishers), torch.rand(P)
    assert store.put(numbers, numbers if rule.needs_fishers else None, 1, 0)
    numbers.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="the memory of tensors of row 0 was freed"):
        rule.aggregate(torch.zeros(P), store)


def test_operators_tell_freed_memory(compiled):
    numbers = torch.rand(5)
    numbers.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory: it was freed"):
        ops.vector_range([numbers], 1)
