"""Sums of weighted entries and of their squares, over some of the parameters."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import client_matrices, rows

F64 = torch.float64


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


@given(data=st.data(), problem=client_matrices(max_clients=9), squares=st.booleans(), weighted=st.booleans())
def test_sums_over_ranges(implementation, data, problem, squares, weighted):
    values, _, P = problem
    K = values.shape[1]
    ranges = data.draw(st.one_of(st.just(torch.tensor([[0, P]])), parameter_ranges(P)))
    read = torch.tensor(data.draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    factors = None
    if weighted:
        dtype, stride = data.draw(st.sampled_from([F64, torch.float32, torch.bfloat16])), data.draw(st.integers(1, 3))
        factors = torch.randn(stride * P, generator=torch.Generator().manual_seed(K)).to(dtype)[::stride]
    total = torch.arange(2.0 * K, dtype=F64).view(2, K)
    got = implementation("moments")(values, factors, read, ranges, total, P, squares)
    assert got.dtype == F64
    assert got.shape == (2, K)
    assert got[:, ~read].isnan().all()
    columns = np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in ranges.tolist())]).astype(int)
    expected, size = exact(rows(values, P), factors, columns, squares)
    error = abs(got.numpy() - expected - total.numpy())[:, read.numpy()]
    assert (error <= 1e-12 * (size + total.numpy())[:, read.numpy()] + 1e-300).all()


def test_what_is_not_finite_stays_with_its_client_and_its_ranges(implementation):
    values = torch.ones(1, 3, 5000)
    values[0, 1, 17], values[0, 2, 4000] = torch.nan, torch.inf
    everybody, zeros = torch.ones(3, dtype=torch.bool), torch.zeros(2, 3, dtype=F64)
    for squares in (False, True):
        all_ = implementation("moments")(values, None, everybody, torch.tensor([[0, 5000]]), zeros, 5000, squares)
        assert all_[:, 0].tolist() == [5000, 5000]
        assert all_[:, 1].isnan().all()
        assert all_[:, 2].isinf().all()
        some = implementation("moments")(values, None, everybody, torch.tensor([[18, 4000]]), zeros, 5000, squares)
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
            ranges, zeros = torch.tensor([[5, 70_001], [70_001, 99_000]]), torch.zeros(2, K, dtype=F64)
            results.append(compiled("moments")(values, factors, read, ranges, zeros, P, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("tile", [32, 700, 5000])
def test_same_bits_however_stretches_are_cut(compiled, tile):
    K, tiles = 4, 3 * max(1, ops.STRETCH // tile) + 1
    P = tiles * tile - 3
    values, factors = torch.randn(tiles, K, tile), torch.rand(P, dtype=F64)
    everybody, zeros = torch.ones(K, dtype=torch.bool), torch.zeros(2, K, dtype=F64)
    once = compiled("moments")(values, factors, everybody, torch.tensor([[7, P - 9]]), zeros, P, True)
    sums, step = zeros, 2 * max(1, ops.STRETCH // tile)
    for first in range(0, tiles, step):
        start, stop = first * tile, min((first + step) * tile, P)
        bounds = (torch.tensor([[7, P - 9]]) - start).clamp(0, stop - start)
        part = values[first : first + step], factors[start:stop], everybody, bounds, sums, stop - start, True
        sums = compiled("moments")(*part)
    assert torch.equal(sums, once)


def test_nobody_and_nothing(implementation):
    values, zeros = torch.ones(1, 3, 10), torch.zeros(2, 3, dtype=F64)
    nobody, nowhere = torch.zeros(3, dtype=torch.bool), torch.empty(0, 2, dtype=torch.int64)
    assert implementation("moments")(values, None, nobody, torch.tensor([[0, 10]]), zeros, 10, False).isnan().all()
    assert (implementation("moments")(values, None, ~nobody, nowhere, zeros, 10, False) == 0).all()
    none = torch.ones(1, 0, 10), None, nobody[:0], torch.tensor([[0, 10]]), zeros[:, :0], 10, False
    assert implementation("moments")(*none).shape == (2, 0)


@pytest.mark.parametrize("call", [ops.moments, ops.moments.checked(ops.moments.reference)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": torch.ones(9, dtype=F64)}, "factors"),
        ({"factors": torch.ones(10).long()}, "factors"),
        ({"read": torch.ones(2, dtype=torch.bool)}, "read"),
        ({"ranges": torch.tensor([[4, 2]])}, "ascending"),
        ({"ranges": torch.tensor([[0, 11]])}, "parameters"),
        ({"ranges": torch.tensor([[0.0, 1.0]])}, "int64"),
        ({"total": torch.zeros(2, 2, dtype=F64)}, "total"),
        ({"values": torch.ones(1, 3, 10).long()}, "float"),
        ({"num_params": 11}, "parameters"),
    ],
)
def test_wrong_arguments(call, change, message):
    arguments = {
        "values": torch.ones(1, 3, 10),
        "factors": None,
        "read": torch.ones(3, dtype=torch.bool),
        "ranges": torch.tensor([[0, 10]]),
        "total": torch.zeros(2, 3, dtype=F64),
        "num_params": 10,
        "squares": False,
    }
    with pytest.raises((RuntimeError, TypeError), match=message):
        call(**{**arguments, **change})
