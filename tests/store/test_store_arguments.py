"""Arguments of a store that cannot be used are named, with what was expected and what came."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fdcr_fast import ParamLayout, UpdateStore

P = 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_params": "3"}, TypeError, "num_params must be an integer, got '3'"),
        ({"num_params": None}, TypeError, "num_params must be an integer, got None"),
        ({"capacity": "3"}, TypeError, "capacity must be an integer, got '3'"),
        ({"tile": 2.5}, TypeError, "tile must be an integer, got 2.5"),
        ({"dtype": "floaty"}, TypeError, "expected dtype to be a torch.dtype or its name, .* got 'floaty'"),
        ({"buffer_dtype": 3}, TypeError, "expected buffer_dtype to be a torch.dtype or its name, .* got 3"),
        ({"layout": {"a": 3}}, TypeError, "layout must be a ParamLayout, got {'a': 3}"),
        ({"layout": ParamLayout(("a",), ((3,),))}, ValueError, "the layout has 3 parameters, the store 10"),
        ({"on_invalid": "drop"}, ValueError, "on_invalid must be one of .* got 'drop'"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_arguments_of_a_store(in_file, arguments, error, message, tmp_path):
    path = {"path": tmp_path / "round.store"} if in_file else {}
    with pytest.raises(error, match=message):
        UpdateStore(**{"num_params": P, "capacity": 2, **path, **arguments})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", [3, 2.5, True, ["a"]])
def test_a_path_is_no_number(path):
    """A file descriptor of this process would be written to."""
    with pytest.raises(TypeError, match="path must be a string or a path, got"):
        UpdateStore(P, 2, path=path)
    with pytest.raises(TypeError, match="path must be a string or a path, got"):
        UpdateStore.open(path)


def test_bytes_for_reading_a_file(tmp_path):
    with pytest.raises(ValueError, match="max_resident is for a store in a file: give its path as well"):
        UpdateStore(P, 2, max_resident=1 << 20)
    with pytest.raises(TypeError, match="max_resident must be an integer, got '1'"):
        UpdateStore(P, 2, path=tmp_path / "a", max_resident="1")
    with pytest.raises(ValueError, match="max_resident must be at least 1, got 0"):
        UpdateStore(P, 2, path=tmp_path / "a", max_resident=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["with_fishers", "sync", "shared", "copy", "cleared"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_flags(flag, value):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got {value!r}"):
        UpdateStore(P, 2, **{flag: value})
    UpdateStore(P, 2, **{flag: np.False_ if flag != "copy" else np.True_})


def test_required_bytes():
    with pytest.raises(TypeError, match="num_params must be an integer, got '3'"):
        UpdateStore.required_bytes("3", 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"row": "a"}, TypeError, "row must be an integer, got 'a'"),
        ({"row": 1.0}, TypeError, "row must be an integer, got 1.0"),
        ({"row": True}, TypeError, "row must be an integer, got True"),
        ({"row": 2}, ValueError, "row 2 is not free"),
        ({"base": "x"}, TypeError, "base must be a tensor, got str"),
        ({"base": np.ones(P)}, TypeError, "base must be a tensor, got ndarray"),
        (
            {"base": torch.ones(P + 1)},
            ValueError,
            r"base must be float32 or float64 \[10\] .* got torch.float32 \[11\]",
        ),
        (
            {"base": torch.ones(P).bfloat16()},
            ValueError,
            r"base must be float32 or float64.* got torch.bfloat16",
        ),
        ({"base": torch.ones(P, device="meta")}, ValueError, "base must be .* on cpu, got .* on meta"),
    ],
)
@pytest.mark.parametrize("copy", [True, False])
def test_what_the_server_says_of_a_contribution(copy, arguments, error, message):
    """The server is to blame, and no client is rejected for it."""
    store = UpdateStore(P, 2, with_fishers=False, copy=copy)
    with pytest.raises(error, match=message):
        store.put(torch.ones(P), None, 1, "client", **arguments)
    assert store.rejected == {}
    assert store.put(torch.ones(P), None, 1, "client", row=np.int64(1), base=torch.zeros(P))


def test_a_warning_that_raises_leaves_the_row_free():
    store = UpdateStore(P, 1, with_fishers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="keeps no Fishers"):
            store.put(torch.ones(P), torch.ones(P), 1, "client")
    assert store.put(torch.ones(P), torch.ones(P), 1, "client")
    assert store.clients == ("client",)
