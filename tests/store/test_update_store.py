from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fdcr_fast.layout import ParamLayout
from fdcr_fast.store.update_store import UpdateStore


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


class Raises:
    """A client's object that fails wherever it is touched."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("boom")

    def __dlpack__(self, *args, **kwargs):
        raise RuntimeError("boom")

    def __dlpack_device__(self):
        raise RuntimeError("boom")

    def __float__(self):
        raise RuntimeError("boom")

    def __repr__(self):
        raise RuntimeError("boom")


class Liar(torch.Tensor):
    """A tensor that says that it is something else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "no tensor"


class Foreign:
    """An array of another library, which speaks DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def read_only(array):
    array = array.numpy().copy()
    array.flags.writeable = False
    return array


LAYOUT = ParamLayout(("a", "b"), ((2, 2), (1,)))
FORMS = {
    "tensor": lambda x: x,
    "float64": lambda x: x.double(),
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": torch.nn.Parameter,
    "strided": lambda x: torch.stack([x, -x], 1)[:, 0],
    "expanded and negated": lambda x: torch.complex(-x, -x).conj().imag,
    "numpy": lambda x: x.numpy(),
    "read-only": lambda x: read_only(x),
    "other byte order": lambda x: x.numpy().astype(">f4"),
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "float16 array": lambda x: x.numpy().astype(np.float16),
    "dlpack": lambda x: Foreign(x.numpy()),
    "bytes": lambda x: x.numpy().tobytes(),
    "bytearray": lambda x: bytearray(x.numpy().tobytes()),
    "memoryview": lambda x: memoryview(x.numpy()),
    "state dict": lambda x: {"buffer": "no matter", "b": x[4:], "a": x[:4].reshape(2, 2)},
    "arrays by name": lambda x: {"a": read_only(x[:4].reshape(2, 2)), "b": x[4:].double().numpy()},
    "transposed parameter": lambda x: {"a": x[:4].reshape(2, 2).t().contiguous().t(), "b": x[4:]},
    "subclass": lambda x: x.as_subclass(Liar),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_may_come_in_any_form(form):
    update, fisher = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0]), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    store = UpdateStore(5, 1, tile=2, layout=LAYOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.put(FORMS[form](update), FORMS[form](fisher), 3), store.rejected
    (kept,) = store
    assert kept.client == 0
    assert kept.num_samples == 3
    assert torch.equal(kept.update, update)
    assert torch.equal(kept.fisher, fisher)


def test_buffers_have_a_dtype():
    update, fisher = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    store = UpdateStore(2, 1, buffer_dtype=torch.bfloat16)
    for vector in (update, fisher):
        assert vector.bfloat16().float().equal(vector)
    as_bytes = [bytes(vector.bfloat16().view(torch.uint8).tolist()) for vector in (update, fisher)]
    assert store.put(*as_bytes, 1)
    assert torch.equal(next(iter(store)).update, update)


META = torch.empty(3, device="meta")


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


HOSTILE = {
    "object array": (lambda: np.array([1, None, "x"], dtype=object), "can't convert"),
    "object that raises": (lambda: Raises(), "boom"),
    "meta": (lambda: META, "without data"),
    "sparse": (lambda: torch.ones(3).to_sparse(), "sparse"),
    "compressed sparse": (lambda: torch.ones(3, 3).to_sparse_csr(), "sparse"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3)], layout=torch.strided), "nested"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "quantized"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "no memory"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "float8"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), "torch.bool"),
    "complex array": (lambda: np.ones(3, dtype=np.complex64), "complex64"),
    "structured array": (lambda: np.zeros(3, dtype=[("x", "f4")]), "no vector"),
    "masked array": (lambda: np.ma.masked_all(3), "a masked array"),
    "too few bytes": (lambda: b"1234567", "no whole number"),
    "other length": (lambda: bytes(16), "vector of 3 parameters, got [4]"),
    "strided memory": (lambda: memoryview(bytes(24))[::2], "no vector"),
    "mapping": (lambda: {"a": torch.ones(3)}, "no layout"),
    "scalar": (lambda: 1.0, "got float"),
    "none": (lambda: None, "got NoneType"),
    "text": (lambda: "1 2 3", "got str"),
    "zero-dimensional": (lambda: torch.tensor(1.0), "got []"),
    "freed": (freed, "memory was freed"),
}


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage|deprecated)")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_objects_are_rejected_by_name(case):
    make, reason = HOSTILE[case]
    value = make()
    store = UpdateStore(3, 2)
    assert store.put(torch.ones(3), torch.arange(3.0), 1, client_id="good")
    assert store.put(value, torch.arange(3.0), 1, client_id="update") is False
    assert store.put(torch.ones(3), value, 1, client_id="Fisher") is False
    for name in ("update", "Fisher"):
        assert f"the {name} " in store.rejected[name]
        assert reason in store.rejected[name]
    assert store.clients == ("good",)


def test_hostile_sample_counts():
    store = UpdateStore(3, 1)
    for count in (Raises(), META[0], 1e300, float("inf"), torch.tensor([1.0, 2.0])):
        assert store.put(torch.ones(3), torch.arange(3.0), count, client_id="bad") is False
        assert "sample count" in store.rejected["bad"]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": torch.ones(2, 2)}, "missing parameters: b"),
        ({"a": torch.ones(2, 2), "b": torch.ones(2)}, "b (2,), expected (1,)"),
        ({"a": torch.ones(2, 2), "b": torch.ones(1).long()}, "parameter b must be floating point"),
        ({"a": META.expand(2, 3)[:, :2], "b": torch.ones(1)}, "without data"),
        ({"a": torch.ones(2, 2), "b": "text"}, "got str"),
        ({"a": torch.ones(2, 2), "b": torch.full((1,), torch.nan)}, "not finite"),
    ],
)
def test_a_mapping_tells_what_is_wrong(entries, reason):
    store = UpdateStore(5, 1, layout=LAYOUT)
    assert not store.put(entries, torch.arange(5.0), 1, client_id="bad")
    assert reason in store.rejected["bad"]


def test_a_layout_must_fit():
    with pytest.raises(ValueError, match="the layout has 5 parameters, the store 6"):
        UpdateStore(6, 1, layout=LAYOUT)


def test_on_invalid_raises_and_records():
    store = UpdateStore(2, 1, on_invalid="raise")
    with pytest.raises(ValueError, match="client 'x': the update is not finite"):
        store.put(torch.full((2,), torch.nan), torch.tensor([0.0, 1.0]), 1, client_id="x")
    assert list(store.rejected) == ["x"]
    with pytest.raises(ValueError, match="on_invalid must be one of"):
        UpdateStore(2, 1, on_invalid="ignore")


def vectors(value, P=3):
    return torch.full((P,), float(value)), torch.arange(float(P)) + value


def filled(*values, capacity=8):
    store = UpdateStore(3, capacity, tile=2)
    for value in values:
        store.put(*vectors(value), value, client_id=value)
    return store


def assert_holds(store, *values):
    assert store.clients == values
    assert len(store) == len(values)
    assert store.num_samples.tolist() == [float(value) for value in values]
    for kept, value in zip(store, values, strict=True):
        update, fisher = vectors(value)
        assert kept.client == value
        assert torch.equal(kept.update, update)
        assert torch.equal(kept.fisher, fisher)
    clients = store.client_updates()
    assert clients.squared_norm.tolist() == [3.0 * value**2 for value in values]
    assert clients.fisher_min.tolist() == [float(value) for value in values]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "replace", "remove", "bad", "look"]), st.integers(1, 6)), max_size=25
    )
)
def test_any_sequence_of_calls_keeps_what_it_should(steps):
    store, expected = UpdateStore(3, 4, tile=2), {}
    for step, value in steps:
        if step == "remove":
            if value in expected:
                assert value in store
                store.remove(value)
                del expected[value]
            else:
                with pytest.raises(KeyError, match="is not in the store"):
                    store.remove(value)
        elif step == "look":
            assert sorted(store.clients) == sorted(expected)
        else:
            good = step != "bad"
            n = value if good else 0
            full = len(expected) == 4 and (value not in expected or step == "replace")
            accepted = good and (value not in expected or step == "replace")
            if full:
                with pytest.raises(RuntimeError, match="the store is full"):
                    store.put(*vectors(value), n, value, replace=step == "replace")
            else:
                assert store.put(*vectors(value), n, value, replace=step == "replace") == accepted
                if accepted:
                    expected[value] = None
    assert_holds(store, *store.clients)
    assert sorted(store.clients) == sorted(expected)


def test_a_replacement_that_is_bad_changes_nothing():
    store = filled(1, 2)
    assert not store.put(torch.full((3,), torch.nan), vectors(1)[1], 1, client_id=1, replace=True)
    assert_holds(store, 1, 2)
    assert "not finite" in store.rejected[1]


def test_gaps_are_closed_by_the_last_clients():
    store = filled(1, 2, 3, 4, 5)
    store.remove(2)
    store.remove(1)
    assert_holds(store, 5, 4, 3)
    store.put(*vectors(6), 6, client_id=6)
    assert_holds(store, 5, 4, 3, 6)


@given(order=st.permutations(range(5)), missing=st.sets(st.integers(0, 4)), later=st.booleans())
def test_given_rows_do_not_depend_on_who_arrives_first(order, missing, later):
    stores = UpdateStore(3, 6, tile=2), UpdateStore(3, 6, tile=2)
    for store, clients in zip(stores, (order, range(5)), strict=True):
        for client in clients:
            if client not in missing:
                assert store.put(*vectors(client + 1), client + 1, client_id=client + 1, row=client)
                with pytest.raises(ValueError, match=f"row {client} is not free"):
                    store.put(*vectors(9), 9, client_id=9, row=client)
        if later:
            store.put(*vectors(9), 9, client_id=9)
    assert stores[0].clients == stores[1].clients
    assert_holds(stores[0], *stores[1].clients)


def test_one_contribution_is_found_by_its_client():
    store = filled(1, 2)
    assert torch.equal(store[2].update, vectors(2)[0])
    with pytest.raises(KeyError):
        store[3]


def test_clear_does_not_allocate():
    store = filled(1, 2)
    where = store.updates.data_ptr()
    store.clear()
    store.put(*vectors(3), 3, client_id=3)
    assert store.updates.data_ptr() == where
    assert_holds(store, 3)


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_threads_put_at_once(on_disk, tmp_path):
    P, clients, threads = 5000, 120, 8
    path = tmp_path / "store" if on_disk else None
    store = UpdateStore(P, clients, tile=1024, path=path, sync=False)

    def client(k):
        generator = torch.Generator().manual_seed(k)
        update, fisher = torch.randn(P, generator=generator), torch.rand(P, generator=generator)
        if k % 5 == 0:
            update[k] = torch.nan
        return update, fisher, k + 1

    first = []

    def send(start):
        for k in range(start + 1, clients, threads):
            assert store.put(*client(k), client_id=k) == (k % 5 != 0)
            first.append(store.put(*client(k - k % 5 + 1), client_id=0))  # everybody also pretends to be client 0
            if k % 7 == 1 and k % 5 != 0:
                store.remove(k)
            store.client_updates()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(threads)))
    expected = {k for k in range(1, clients) if k % 5 != 0 and k % 7 != 1}
    assert set(store.clients) == expected | {0}
    assert sum(first) == 1
    for kept in store:
        update, fisher, n = client(kept.client)
        if kept.client in expected:
            assert torch.equal(kept.update, update)
            assert torch.equal(kept.fisher, fisher)
            assert kept.num_samples == n


def test_memory_is_known_in_advance():
    store = UpdateStore(1000, 7, torch.bfloat16, with_fishers=False)
    assert UpdateStore.required_bytes(1000, 7, torch.bfloat16, with_fishers=False) == store.nbytes
    size = UpdateStore.required_bytes(10**9, 10**5)
    assert size >= 8 * 10**14
    with pytest.raises(ValueError, match=r"takes 7.*e\+05 GiB, and .* GiB of memory are left"):
        UpdateStore(10**9, 10**5)
