"""Sums of weighted entries and of their squares, over some of the parameters."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import client_matrices, rows

F64 = torch.float64
ONES = torch.zeros(0, dtype=F64)  # the factors of a view without any


def exact(values, factors, columns, squares):
    """``[2, K]`` in extended precision, and sums of sizes."""
    x = np.asarray(values, np.longdouble)
    x = (x**2 if squares else x) * (1 if factors is None else np.asarray(factors.double(), np.longdouble))
    x = x[:, columns]
    return np.stack([x.sum(1), (x**2).sum(1)]), np.stack([abs(x).sum(1), (x**2).sum(1)])


@st.composite
def parameter_ranges(draw, P):
    bounds = sorted(draw(st.lists(st.integers(0, P), max_size=12)))
    return torch.tensor(bounds[: len(bounds) // 2 * 2], dtype=torch.int64).view(-1, 2)


@given(
    data=st.data(),
    problem=client_matrices(max_clients=9),
    views=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=3),
)
def test_sums_over_ranges(implementation, data, problem, views):
    values, _, P = problem
    K, M = values.shape[1], len(views)
    ranges = [data.draw(st.one_of(st.just(torch.tensor([[0, P]])), parameter_ranges(P))) for _ in views]
    read = torch.tensor(data.draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    generator = torch.Generator().manual_seed(K)
    dtypes, strides = st.sampled_from([F64, torch.float32, torch.bfloat16]), st.integers(1, 3)
    factors = [ONES] * M
    for i, (weighted, _) in enumerate(views):
        if weighted:
            dtype, stride = data.draw(dtypes), data.draw(strides)
            factors[i] = torch.randn(stride * P, generator=generator).to(dtype)[::stride]
    total = torch.arange(2.0 * M * K, dtype=F64).view(M, 2, K)
    got = implementation("moments")(values, factors, read, ranges, total, P, [squares for _, squares in views])
    assert got.dtype == F64
    assert got.shape == (M, 2, K)
    assert got[..., ~read].isnan().all()
    for sums, before, own, parts, (_, squares) in zip(got, total, factors, ranges, views, strict=True):
        columns = np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in parts.tolist())]).astype(int)
        expected, size = exact(rows(values, P), own if len(own) else None, columns, squares)
        error = abs(sums.numpy() - expected - before.numpy())[:, read.numpy()]
        assert (error <= 1e-12 * (size + before.numpy())[:, read.numpy()] + 1e-300).all()


def test_what_is_not_finite_stays_with_its_client_and_its_ranges(implementation):
    values = torch.ones(1, 3, 5000)
    values[0, 1, 17], values[0, 2, 4000] = torch.nan, torch.inf
    everybody, zeros = torch.ones(3, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=F64)
    ranges = [torch.tensor([[0, 5000]]), torch.tensor([[18, 4000]])]
    for squares in ([False, False], [True, True]):
        all_, some = implementation("moments")(values, [ONES, ONES], everybody, ranges, zeros, 5000, squares)
        assert all_[:, 0].tolist() == [5000, 5000]
        assert all_[:, 1].isnan().all()
        assert all_[:, 2].isinf().all()
        assert (some == 3982).all()


@pytest.mark.parametrize("tile", [32, 100_000])
def test_same_bits_for_any_number_of_threads(compiled, tile):
    K, P = 7, 100_000
    values = torch.randn(-(-P // tile), K, tile)
    factors, read = torch.rand(P, dtype=F64), torch.ones(K, dtype=torch.bool)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            ranges, zeros = [torch.tensor([[5, 70_001], [70_001, 99_000]])] * 2, torch.zeros(2, 2, K, dtype=F64)
            results.append(compiled("moments")(values, [factors, ONES], read, ranges, zeros, P, [True, False]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("tile", [32, 700, 5000])
def test_same_bits_however_stretches_are_cut(compiled, tile):
    K, tiles = 4, 3 * max(1, ops.STRETCH // tile) + 1
    P = tiles * tile - 3
    values, factors = torch.randn(tiles, K, tile), torch.rand(P, dtype=F64)
    everybody, zeros = torch.ones(K, dtype=torch.bool), torch.zeros(2, 2, K, dtype=F64)
    ranges = [torch.tensor([[7, P - 9]]), torch.tensor([[0, 1], [29, P]])]
    once = compiled("moments")(values, [factors, ONES], everybody, ranges, zeros, P, [True, False])
    sums, step = zeros, 2 * max(1, ops.STRETCH // tile)
    for first in range(0, tiles, step):
        start, stop = first * tile, min((first + step) * tile, P)
        bounds = [(parts - start).clamp(0, stop - start) for parts in ranges]
        part = values[first : first + step], [factors[start:stop], ONES], everybody, bounds, sums, stop - start
        sums = compiled("moments")(*part, [True, False])
    assert torch.equal(sums, once)
    alone = compiled("moments")(values, [ONES], everybody, ranges[1:], zeros[1:], P, [False])
    assert torch.equal(alone, once[1:])


def test_nobody_and_nothing(implementation):
    values, zeros, call = torch.ones(1, 3, 10), torch.zeros(1, 2, 3, dtype=F64), implementation("moments")
    nobody, nowhere, everywhere = torch.zeros(3, dtype=torch.bool), torch.empty(0, 2).long(), torch.tensor([[0, 10]])
    assert call(values, [ONES], nobody, [everywhere], zeros, 10, [False]).isnan().all()
    assert (call(values, [ONES], ~nobody, [nowhere], zeros, 10, [False]) == 0).all()
    assert call(torch.ones(1, 0, 10), [ONES], nobody[:0], [everywhere], zeros[..., :0], 10, [False]).shape == (1, 2, 0)
    assert call(values, [], ~nobody, [], zeros[:0], 10, []).shape == (0, 2, 3)


@pytest.mark.parametrize("call", [ops.moments, ops.moments.checked(ops.moments.reference)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [torch.ones(9, dtype=F64)]}, "factors"),
        ({"factors": [torch.ones(10).long()]}, "factors"),
        ({"factors": [ONES, ONES]}, "views"),
        ({"read": torch.ones(2, dtype=torch.bool)}, "read"),
        ({"ranges": [torch.tensor([[4, 2]])]}, "ascending"),
        ({"ranges": [torch.tensor([[0, 11]])]}, "parameters"),
        ({"ranges": [torch.tensor([[0.0, 1.0]])]}, "int64"),
        ({"ranges": []}, "views"),
        ({"squares": [True, False]}, "views"),
        ({"total": torch.zeros(1, 2, 2, dtype=F64)}, "total"),
        ({"values": torch.ones(1, 3, 10).long()}, "float"),
        ({"num_params": 11}, "parameters"),
    ],
)
def test_wrong_arguments(call, change, message):
    arguments = {
        "values": torch.ones(1, 3, 10),
        "factors": [ONES],
        "read": torch.ones(3, dtype=torch.bool),
        "ranges": [torch.tensor([[0, 10]])],
        "total": torch.zeros(1, 2, 3, dtype=F64),
        "num_params": 10,
        "squares": [False],
    }
    with pytest.raises((RuntimeError, TypeError), match=message):
        call(**{**arguments, **change})
