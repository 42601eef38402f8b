import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import (
    conv_one_by_one,
    convolutions,
    laid_out,
    linear_one_by_one,
    relative_error,
    tensors,
)


def check(got, expected, dtypes):
    assert all(t.is_contiguous() for t in got)
    assert all(t.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32) for t in got)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert relative_error(g, e) < 1e-5


@given(problem=convolutions())
def test_convolution_against_one_sample_at_a_time(implementation, problem):
    got = implementation("sum_squared_grads_conv")(*problem)
    check(got, conv_one_by_one(*problem), [problem[0].dtype, problem[1].dtype])


@given(data=st.data())
def test_linear_against_one_sample_at_a_time(implementation, data):
    n, t = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([1, 1, 2, 3, 17]))
    out, in_ = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    grad, input = data.draw(tensors((n, t, out))), data.draw(tensors((n, t, in_)))
    got = implementation("sum_squared_grads_linear")(grad, input)
    check(got, linear_one_by_one(grad, input), [grad.dtype, input.dtype])


# Large enough for every path of the compiled kernels: sums owned by tasks, chunks of packed samples, blocks of samples.
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "offset"])
@pytest.mark.parametrize(
    ("n", "channels", "out", "size", "kernel", "stride", "padding", "groups"),
    [
        (3, 64, 130, (6, 6), (3, 3), (1, 1), (1, 1), 1),
        (2, 96, 96, (5, 7), (3, 3), (2, 1), (1, 0), 1),
        (70, 33, 64, (16, 16), (3, 3), (1, 1), (1, 1), 1),
        (9, 3, 6, (32, 31), (5, 5), (1, 1), (0, 0), 1),
        (4, 150, 70, (9, 7), (1, 1), (2, 2), (0, 0), 1),
        (4, 70, 150, (9, 7), (1, 1), (2, 1), (0, 0), 1),
        (2, 40, 20, (9, 9), (3, 3), (1, 1), (0, 0), 1),
        (5, 12, 24, (9, 9), (3, 3), (1, 1), (1, 1), 12),
        (4, 5, 11, (1, 1), (1, 1), (2, 2), (0, 0), 1),
        (4, 5, 11, (1, 1), (1, 1), (3, 3), (1, 1), 1),
    ],
)
def test_large_convolutions(implementation, layout, n, channels, out, size, kernel, stride, padding, groups):
    generator = torch.Generator().manual_seed(0)
    x = laid_out(torch.randn(n, channels, *size, generator=generator), layout)
    spatial = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
    grad = laid_out(torch.randn(n, out, *spatial, generator=generator), layout)
    problem = (grad, x, kernel, stride, padding, (1, 1), groups)
    check(implementation("sum_squared_grads_conv")(*problem), conv_one_by_one(*problem), [x.dtype])


@pytest.mark.parametrize(
    ("n", "t", "out", "in_"),
    [
        (1300, 1, 30, 50),
        (513, 1, 300, 7),
        (4, 40, 300, 300),
        (90, 17, 260, 270),
        (3, 5, 4, 0),
        (3, 1, 4, 0),
        (3, 5, 0, 4),
    ],
)
def test_large_and_empty_linear(implementation, n, t, out, in_):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(n, t, c, generator=generator) for c in (out, in_))
    check(implementation("sum_squared_grads_linear")(grad, x), linear_one_by_one(grad, x), [x.dtype])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_input_reaches_exactly_its_own_sums(implementation, poison):
    grad, x = torch.ones(2, 3, 8), torch.ones(2, 3, 9)
    x[1, 2, 4] = poison
    weight, bias = implementation("sum_squared_grads_linear")(grad, x)
    assert not weight[:, 4].isfinite().any()
    assert weight[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize("scale", [1e-19, 1e-30, 1e18])
def test_tiny_and_huge_values(implementation, scale):
    grad, x = scale * torch.ones(1, 1, 4), torch.ones(1, 1, 5)
    weight, _ = implementation("sum_squared_grads_linear")(grad, x)
    torch.testing.assert_close(weight, torch.full((4, 5), scale**2), rtol=1e-5, atol=2e-45)


def test_same_bits_for_any_number_of_threads(compiled):
    generator = torch.Generator().manual_seed(0)
    grad, x = torch.randn(37, 20, 8, 8, generator=generator), torch.randn(37, 9, 10, 10, generator=generator)
    wide = torch.randn(9, 128, 6, 6, generator=generator)
    problems = [
        ("sum_squared_grads_conv", (grad, x, (3, 3), (1, 1), (0, 0), (1, 1), 1)),
        ("sum_squared_grads_conv", (wide, wide, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
        ("sum_squared_grads_linear", (wide.flatten(2), wide.flatten(2))),
        ("sum_squared_grads_linear", (wide.flatten(1)[:, None], wide[:, :, 0, 0][:, None])),
    ]
    before = torch.get_num_threads()
    try:
        for name, problem in problems:
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(compiled(name)(*problem))
            for result in results[1:]:
                assert torch.equal(result[0], results[0][0])
                assert torch.equal(result[1], results[0][1])
    finally:
        torch.set_num_threads(before)


def conv_args(grad=(2, 4, 3, 3), input=(2, 4, 5, 5), kernel=(3, 3), stride=(1, 1), padding=(0, 0), groups=1):
    return torch.zeros(grad), torch.zeros(input), kernel, stride, padding, (1, 1), groups


@pytest.mark.parametrize(
    "args",
    [
        conv_args(grad=(3, 4, 3, 3)),
        conv_args(grad=(2, 4, 4, 3)),
        conv_args(input=(2, 4, 2, 5)),
        conv_args(groups=3),
        conv_args(groups=0),
        conv_args(stride=(0, 1)),
        conv_args(padding=(-1, 0)),
        conv_args(kernel=(3,)),
    ],
)
def test_convolution_refuses_what_does_not_fit(args):
    with pytest.raises(RuntimeError):
        ops.sum_squared_grads_conv(*args)


def test_linear_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="expected"):
        ops.sum_squared_grads_linear(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
    with pytest.raises(RuntimeError, match="expected"):
        ops.sum_squared_grads_linear(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="float"):
        ops.sum_squared_grads_linear(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64))
