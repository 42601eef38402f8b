import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import laid_out, relative_error, tensors


def one_by_one(grad, indices, num_embeddings):
    """Dense gradient tables of one sample at a time, in float64."""
    total = torch.zeros(num_embeddings, grad.shape[2], dtype=torch.float64)
    for g, tokens in zip(grad.double(), indices.tolist(), strict=True):
        table = torch.zeros_like(total)
        for row, token in zip(g, tokens, strict=True):
            if token >= 0:
                table[token] += row
        total += table**2
    return total


def check(got, problem):
    assert got.dtype == (torch.float64 if problem[0].dtype == torch.float64 else torch.float32)
    assert got.is_contiguous()
    expected = one_by_one(*problem)
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-5


@st.composite
def problems(draw):
    n, t, width = draw(st.integers(0, 5)), draw(st.integers(0, 7)), draw(st.sampled_from([1, 2, 19, 64, 300]))
    rows = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    indices = torch.randint(-1, rows, (n, t), generator=torch.Generator().manual_seed(seed))
    return draw(tensors((n, t, width))), laid_out(indices, draw(st.sampled_from(["contiguous", "transposed"]))), rows


@given(problem=problems())
def test_against_one_sample_at_a_time(implementation, problem):
    check(implementation("sum_squared_grads_embedding")(*problem), problem)


@pytest.mark.parametrize("rows", [1, 3, 900])
def test_many_tokens(implementation, rows):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, rows, (13, 200), generator=generator)
    problem = torch.randn(13, 200, 70, generator=generator), indices, rows
    check(implementation("sum_squared_grads_embedding")(*problem), problem)


def test_no_rows(implementation):
    got = implementation("sum_squared_grads_embedding")(torch.randn(2, 3, 4), torch.full((2, 3), -1), 0)
    assert got.shape == (0, 4)


def test_same_bits_for_any_number_of_threads(compiled):
    generator = torch.Generator().manual_seed(0)
    grad, indices = torch.randn(9, 50, 200, generator=generator), torch.randint(0, 7, (9, 50), generator=generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(compiled("sum_squared_grads_embedding")(grad, indices, 7))
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_index_out_of_range(implementation):
    with pytest.raises((RuntimeError, IndexError), match="out of"):
        implementation("sum_squared_grads_embedding")(torch.zeros(2, 2, 4), torch.tensor([[0, 1], [3, 0]]), 3)


@pytest.mark.parametrize(
    ("grad", "indices", "rows"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(3, 2, dtype=torch.int64), 3),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 3),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), 3),
        (torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), 3),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), -1),
    ],
)
def test_refuses_what_does_not_fit(grad, indices, rows):
    with pytest.raises(RuntimeError, match=r"expected|must"):
        ops.sum_squared_grads_embedding(grad, indices, rows)
