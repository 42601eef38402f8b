import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import laid_out, relative_error, tensors


def one_by_one(grad, x, mean, variance, eps):
    """Straight from the formula, in float64."""
    weight, bias = torch.zeros(2, *x.shape[2:4], dtype=torch.float64)
    for g, v in zip(grad.double(), x.double(), strict=True):
        m = v.mean((2, 3), keepdim=True) if mean is None else mean.double()[:, :, None]
        s = ((v - m) ** 2).mean((2, 3), keepdim=True) if variance is None else variance.double()[:, :, None]
        weight += (g * (v - m) / (s + eps).sqrt()).sum((0, 3)) ** 2
        bias += g.sum((0, 3)) ** 2
    return weight, bias


def check(got, problem):
    double = torch.float64 in (problem[0].dtype, problem[1].dtype)
    for g, e in zip(got, one_by_one(*problem), strict=True):
        assert g.dtype == (torch.float64 if double else torch.float32)
        assert g.is_contiguous()
        assert g.shape == e.shape
        assert relative_error(g, e) < 1e-5


@st.composite
def problems(draw):
    # Wider than a vector, or narrow; few elements that share statistics are ill conditioned in float32.
    n, t, g = draw(st.integers(0, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    c, s = draw(st.sampled_from([(1, 9), (7, 1), (37, 1), (1, 70), (3, 5), (19, 2), (2, 33), (40, 40)]))
    statistics = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    mean = draw(st.none() | tensors((g, c), draw(statistics)))
    variance = draw(st.none() | tensors((g, c), draw(statistics)))
    grad, x = draw(tensors((n, t, g, c, s))), draw(tensors((n, t, g, c, s)))
    mean = None if mean is None else mean / 2  # may be drawn from the same numbers as x, and all would cancel
    return grad, x, mean, None if variance is None else variance**2, draw(st.sampled_from([1e-5, 0.1]))


@given(problem=problems())
def test_against_one_sample_at_a_time(implementation, problem):
    check(implementation("sum_squared_grads_norm")(*problem), problem)


# Long lines and many of them: every partial sum of the compiled kernels.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(3, 1, 2, 3, 2500), (3, 2500, 1, 40, 1), (20, 2, 1, 6, 1300)])
def test_large(implementation, shape, layout):
    generator = torch.Generator().manual_seed(0)
    grad, x = (laid_out(torch.randn(shape, generator=generator), layout) for _ in range(2))
    problem = grad, 3 * x + 5, None, None, 1e-5
    check(implementation("sum_squared_grads_norm")(*problem), problem)


def test_gradient_that_was_expanded(implementation):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 1, 2, 3, 1, generator=generator).expand(4, 1, 2, 3, 21)
    problem = grad, torch.randn(4, 1, 2, 3, 21, generator=generator), None, None, 1e-5
    check(implementation("sum_squared_grads_norm")(*problem), problem)


def test_statistics_of_the_sample_are_what_layer_norm_has(implementation):
    x = torch.randn(5, 7, 33, dtype=torch.float64) * 2 + 1
    weight = torch.ones(33, dtype=torch.float64, requires_grad=True)
    total = 0
    for v in x:
        out = torch.nn.functional.layer_norm(v, (33,), weight).tanh().sum()
        total = total + torch.autograd.grad(out, weight)[0] ** 2
    grad = 1 - torch.nn.functional.layer_norm(x, (33,)).tanh() ** 2
    shape = 5, 7, 1, 33, 1
    got, _ = implementation("sum_squared_grads_norm")(grad.view(shape), x.view(shape), None, None, 1e-5)
    assert relative_error(got[0], total) < 1e-12


def test_same_bits_for_any_number_of_threads(compiled):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 37, 3, 2, 5, 50, generator=generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(torch.stack(compiled("sum_squared_grads_norm")(grad, x, None, None, 1e-5)))
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_non_finite_input_stays_in_its_group(implementation):
    x, grad = torch.randn(2, 3, 2, 2, 4, 5).unbind()
    x[1, 0, 1, 2, 3] = torch.nan
    weight, bias = implementation("sum_squared_grads_norm")(grad, x, None, None, 1e-5)
    assert weight[0].isfinite().all()
    assert weight[1].isnan().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize(
    ("grad", "input", "mean", "variance"),
    [
        (torch.zeros(2, 1, 2, 3, 4), torch.zeros(2, 1, 2, 3, 5), None, None),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, None),
        (*torch.zeros(2, 2, 1, 2, 3, 4), torch.zeros(3), None),
        (*torch.zeros(2, 2, 1, 2, 3, 4), None, torch.zeros(3, 2)),
        (torch.zeros(2, 1, 2, 3, 4), torch.zeros(2, 1, 2, 3, 4, dtype=torch.int64), None, None),
    ],
)
def test_refuses_what_does_not_fit(grad, input, mean, variance):
    with pytest.raises(RuntimeError, match=r"expected|must"):
        ops.sum_squared_grads_norm(grad, input, mean, variance, 1e-5)
