from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast.server.store import UpdateStore


@given(
    P=st.integers(1, 40),
    K=st.integers(1, 5),
    tile=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_tiles_hold_the_rows(P, K, tile, dtype):
    store = UpdateStore(P, K + 2, dtype, tile=tile)
    updates, fishers = torch.randn(K, P), torch.rand(K, P)
    for k in range(K):
        assert store.put(updates[k], fishers[k].numpy(), k + 1)
    for tiled, matrix in ((store.updates, updates), (store.fishers, fishers)):
        assert tiled.shape == (-(-P // tile), K, tile)
        assert torch.equal(tiled.transpose(0, 1).reshape(K, -1)[:, :P], matrix.to(dtype))
    assert store.clients == tuple(range(K))
    assert store.num_samples.tolist() == list(range(1, K + 1))
    assert len(store) == K
    assert store.nbytes == -(-P // tile) * (K + 2) * 2 * tile * dtype.itemsize


@given(P=st.integers(1, 10**6), K=st.integers(1, 5000))
def test_default_tiles_waste_little(P, K):
    store = UpdateStore(P, K) if P * K < 10**6 else UpdateStore(P, 1)
    tile = store.tile
    assert 1 <= tile <= P
    assert store.nbytes <= 2 * store.capacity * 4 * (P + tile)


def test_padding_is_never_read():
    store = UpdateStore(5, 2, tile=4)
    store._rows.data.fill_(torch.nan)
    assert store.put(torch.ones(5), torch.arange(5.0), 1)
    clients = store.client_updates()
    assert clients.squared_norm.tolist() == [5.0]
    assert (clients.fisher_min.item(), clients.fisher_max.item()) == (0.0, 4.0)


@pytest.mark.parametrize(
    ("update", "fisher", "num_samples", "reason"),
    [
        (torch.ones(4), torch.arange(3.0), 1, "the update must be a vector of 3 parameters, got [4]"),
        (torch.ones(3, 1), torch.arange(3.0), 1, "the update must be a vector of 3 parameters, got [3, 1]"),
        (torch.ones(3), torch.arange(2.0), 1, "the Fisher must be a vector of 3 parameters, got [2]"),
        (
            torch.ones(3, dtype=torch.int64),
            torch.arange(3.0),
            1,
            "the update must be floating point (64 bits to 16), got torch.int64",
        ),
        (torch.ones(3), np.arange(3), 1, "the Fisher must be floating point (64 bits to 16), got torch.int64"),
        (torch.ones(3), torch.arange(3).to(torch.complex64), 1, "the Fisher must be floating point"),
        ([1.0, 2.0, 3.0], torch.arange(3.0), 1, "the update is no vector: expected a torch.Tensor"),
        (
            torch.ones(3),
            None,
            1,
            "the Fisher is no vector: expected a torch.Tensor or numpy.ndarray, got NoneType",
        ),
        (np.array(["a", "b", "c"]), torch.arange(3.0), 1, "the update is no vector: can't convert"),
        (torch.tensor([1, torch.nan, 1]), torch.arange(3.0), 1, "the update is not finite"),
        (torch.tensor([1, torch.inf, 1]), torch.arange(3.0), 1, "the update is not finite"),
        (torch.full((3,), 1e300, dtype=torch.float64), torch.arange(3.0), 1, "the update is not finite"),
        (torch.ones(3), torch.tensor([0, torch.nan, 1]), 1, "the Fisher is not finite"),
        (torch.ones(3), torch.tensor([0, torch.inf, 1]), 1, "the Fisher is not finite"),
        (torch.ones(3), torch.tensor([0, -1.0, 1]), 1, "the Fisher has negative entries, the smallest is -1"),
        (torch.ones(3), torch.arange(3.0), 0, "the sample count must be positive and finite, got 0"),
        (torch.ones(3), torch.arange(3.0), -1, "the sample count must be positive and finite, got -1"),
        (
            torch.ones(3),
            torch.arange(3.0),
            float("nan"),
            "the sample count must be positive and finite, got nan",
        ),
        (torch.ones(3), torch.arange(3.0), "many", "the sample count must be a number, got 'many'"),
        (torch.ones(3), torch.arange(3.0), None, "the sample count must be a number, got None"),
        (torch.ones(3), torch.arange(3.0), torch.ones(2), "the sample count must be a number"),
        (torch.ones(3), torch.arange(3.0), 10**400, "the sample count must be a number"),
    ],
)
def test_bad_clients_are_recorded_and_their_rows_used_again(update, fisher, num_samples, reason):
    store = UpdateStore(3, 1, tile=2)
    assert store.put(update, fisher, num_samples, client_id="bad") is False
    assert reason in store.rejected["bad"]
    assert len(store) == 0
    assert store.put(torch.ones(3), torch.arange(3.0), 2, client_id="good") is True
    assert store.clients == ("good",)
    assert list(store.rejected) == ["bad"]
    assert store.updates.flatten()[:3].tolist() == [1.0] * 3


def test_the_first_of_two_contributions_stays():
    store = UpdateStore(2, 3)
    assert store.put(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), 4, client_id=7)
    assert not store.put(torch.tensor([9.0, 9.0]), torch.tensor([0.0, 1.0]), 5, client_id=7)
    assert "second contribution" in store.rejected[7]
    assert store.clients == (7,)
    assert store.updates.flatten().tolist() == [1.0, 2.0]
    assert store.num_samples.tolist() == [4.0]


def test_a_rejected_client_may_try_again():
    store = UpdateStore(2, 3)
    assert not store.put(torch.tensor([1.0, torch.nan]), torch.tensor([0.0, 1.0]), 4, client_id=7)
    assert store.put(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), 4, client_id=7)
    assert store.rejected == {}


def test_clients_are_numbered_by_arrival():
    store = UpdateStore(2, 3)
    for update in (torch.ones(2), torch.ones(2) * torch.nan, torch.ones(2)):
        store.put(update, torch.tensor([0.0, 1.0]), 1)
    assert store.clients == (0, 2)
    assert list(store.rejected) == [1]


def test_a_full_store_says_its_capacity():
    store = UpdateStore(2, 1)
    store.put(torch.ones(2), torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(RuntimeError, match="capacity is 1"):
        store.put(torch.ones(2), torch.tensor([0.0, 1.0]), 1)


def test_clear_starts_the_next_round():
    store = UpdateStore(2, 1)
    store.put(torch.ones(2), torch.tensor([0.0, 1.0]), 1)
    store.reject("late", "timed out")
    store.clear()
    assert (len(store), store.clients, store.rejected) == (0, (), {})
    assert store.put(torch.ones(2), torch.tensor([0.0, 1.0]), 1)
    assert store.clients == (0,)


def test_reject_records_absent_clients_only():
    store = UpdateStore(2, 1)
    store.put(torch.ones(2), torch.tensor([0.0, 1.0]), 1, client_id="here")
    store.reject("late", "timed out")
    assert store.rejected == {"late": "timed out"}
    assert store.client_updates().rejected == {"late": "timed out"}
    with pytest.raises(ValueError, match="already accepted"):
        store.reject("here", "disliked")


def test_a_store_without_fishers_takes_half():
    store = UpdateStore(4, 2, tile=4, with_fishers=False)
    assert store.nbytes == UpdateStore(4, 2, tile=4).nbytes // 2
    assert store.put(torch.ones(4), None, 1)
    assert store.fishers is None
    assert not store.client_updates().tiles.with_fishers


@pytest.mark.parametrize("size", [{"num_params": 0}, {"capacity": 0}, {"tile": 0}, {"capacity": -1}])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match=f"{next(iter(size))} must be at least 1"):
        UpdateStore(**{"num_params": 3, "capacity": 2, **size})


def test_the_dtype_must_be_floating():
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        UpdateStore(3, 2, torch.int8)


def test_what_is_kept_is_a_copy():
    store = UpdateStore(2, 1)
    update = torch.ones(2)
    store.put(update, torch.tensor([0.0, 1.0]), 1)
    update.zero_()
    assert store.updates.flatten().tolist() == [1.0, 1.0]
    assert "1 clients, 0 rejected" in repr(store)
