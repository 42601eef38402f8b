"""Arrays seen on the bytes that came in, and hostile bytes."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

from fdcr_fast.integrations.npy import npy_tensor


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", ">f4", "<i8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_every_array_comes_back(dtype, shape):
    array = (10 * np.random.default_rng(0).random(shape)).astype(dtype)
    for form in (array, np.asfortranarray(array)):
        tensor = npy_tensor(saved(form))
        assert tensor.shape == form.shape
        assert np.array_equal(tensor.numpy(), form)


def test_nothing_is_copied_and_the_bytes_live_as_long_as_the_tensor():
    data = saved(np.arange(1000, dtype=np.float32))
    tensor = npy_tensor(data)
    address = np.frombuffer(data, np.uint8).ctypes.data
    assert address < tensor.data_ptr() < address + len(data)
    del data
    assert tensor.sum() == 999 * 500


WHOLE = saved(np.arange(6, dtype=np.float32))
HOSTILE = {
    "nothing": b"",
    "no file": b"hello",
    "pickle": pickle.dumps([1.0]),
    "objects": saved(np.array([{}], dtype=object), allow_pickle=True),
    "too short": WHOLE[:-1],
    "only a header": WHOLE[:128],
    "half a header": WHOLE[:60],
    "negative size": WHOLE.replace(b"(6,)", b"(-6)"),
    "negative sizes": WHOLE.replace(b"(6,), ", b"(-2,-3"),
    "huge": WHOLE.replace(b"(6,), ", b"(9**9)"),
    "no dtype": WHOLE.replace(b"<f4", b"<x4"),
    "records": saved(np.zeros(3, dtype=[("a", "<f4")])),
    "version 9": WHOLE[:6] + b"\x09" + WHOLE[7:],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_raise_and_nothing_else(case):
    with pytest.raises((ValueError, TypeError)):
        npy_tensor(HOSTILE[case])


def test_memory_that_is_not_aligned():
    data = WHOLE.replace(b"\n", b" ", 1)[:-24]  # a header that is 1 byte longer
    data = data[:127] + b" \n" + WHOLE[128:]
    data = data[:8] + (119).to_bytes(2, "little") + data[10:]
    tensor = npy_tensor(data)
    assert torch.equal(tensor, torch.arange(6.0))
    assert tensor.data_ptr() % 4 == 0
