from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fdcr_fast.layout import ParamLayout, as_tensor

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), max_size=6)


@given(SHAPES)
def test_flatten_and_unflatten_are_inverse(shapes):
    layout = ParamLayout([f"p{i}" for i in range(len(shapes))], shapes)
    assert layout.numel == sum(math.prod(shape) for shape in shapes)
    tensors = [torch.randn(shape) for shape in shapes]
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.numel,)
    named = layout.unflatten(vector)
    assert list(named) == list(layout.names)
    for name, tensor, offset, shape in zip(layout.names, tensors, layout.offsets, shapes, strict=True):
        assert named[name].shape == shape
        assert torch.equal(named[name], tensor)
        assert layout.slices[name] == slice(offset, offset + tensor.numel())
    assert torch.equal(layout.flatten(named), vector)


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def test_module_state_dict_and_lists_agree():
    model = network()
    layout = ParamLayout.from_module(model)
    assert layout.names == tuple(name for name, _ in model.named_parameters())
    expected = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(layout.flatten(model), expected)
    assert torch.equal(layout.flatten(model.state_dict()), expected)  # its buffers lie between the parameters
    assert torch.equal(layout.flatten(list(model.parameters())), expected)
    assert torch.equal(layout.flatten([p.detach().numpy() for p in model.parameters()]), expected)
    assert not layout.flatten(model).requires_grad


def test_shared_parameters_come_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    layout = ParamLayout.from_module(model)
    assert layout.names == ("0.weight", "0.bias", "1.bias")
    assert torch.equal(layout.flatten(model.state_dict()), layout.flatten(model))


def test_layout_of_another_name_of_a_shared_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert torch.equal(ParamLayout(("1.weight",), ((4, 4),)).flatten(model), model[0].weight.flatten())


def test_results_share_memory_only_where_promised():
    layout = ParamLayout(("a",), ((2, 3),))
    source = torch.randn(2, 3)
    vector = layout.flatten([source])
    vector += 1
    assert not torch.equal(vector.view(2, 3), source)
    layout.unflatten(vector)["a"][1, 2] = 7.0
    assert vector[5] == 7.0


def test_dtype():
    layout = ParamLayout(("a", "b"), ((2,), ()))
    mixed = [torch.ones(2, dtype=torch.bfloat16), torch.ones((), dtype=torch.float64)]
    assert layout.flatten(mixed).dtype == torch.float64
    assert layout.flatten(mixed, torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "array",
    [
        np.frombuffer(np.arange(6.0).tobytes()),
        np.arange(6.0)[::-1],
        np.arange(6, dtype=">f4"),
        np.arange(12, dtype=np.float16)[::2],
    ],
    ids=["read-only", "reversed", "big-endian", "strided"],
)
def test_any_array_is_taken_without_a_warning(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(array).tolist() == array.tolist()


def test_writable_arrays_are_not_copied():
    array = np.zeros(3)
    as_tensor(array)[1] = 5
    assert array[1] == 5


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"a": torch.ones(2, 3)}, ValueError, "missing parameters: b"),
        ({"a": torch.ones(3, 2), "b": torch.ones(())}, ValueError, r"a \(3, 2\), expected \(2, 3\)"),
        ({"a": torch.ones(6), "b": torch.ones(1)}, ValueError, r"a \(6,\), .*; b \(1,\), expected \(\)"),
        ([torch.ones(2, 3)], ValueError, "expected 2 parameters, got 1"),
        ([torch.ones(2, 3), 1.0], TypeError, "got float"),
        ([torch.ones(2, 3), np.array("x")], TypeError, "numpy.str_"),
    ],
)
def test_flatten_says_what_does_not_fit(source, error, message):
    with pytest.raises(error, match=message):
        ParamLayout(("a", "b"), ((2, 3), ())).flatten(source)


def test_unflatten_says_what_does_not_fit():
    layout = ParamLayout(("a",), ((2, 3),))
    for vector in (torch.ones(5), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="vector of 6 elements"):
            layout.unflatten(vector)


def test_names_must_fit():
    with pytest.raises(ValueError, match="unique"):
        ParamLayout(("a", "a"), ((), ()))
    with pytest.raises(ValueError, match="2 names but 1 shapes"):
        ParamLayout(("a", "b"), ((),))
    assert hash(ParamLayout(("a",), ((2,),))) == hash(ParamLayout(["a"], [[2]]))
