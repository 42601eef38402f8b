from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast.ops import STRETCH
from tests.support.operands import NOTHING, vectors


@given(problem=vectors(), base_dtype=st.sampled_from([None, torch.float32, torch.float64]))
def test_it_is_a_rounded_copy_and_its_statistics(implementation, problem, base_dtype):
    pieces, row = problem
    P = sum(piece.numel() for piece in pieces)
    before = torch.tensor([1.0, 0.5, 0.75], dtype=torch.float64)
    if base_dtype is None:
        statistics = implementation("fill_row")(pieces, row, before)
        expected = torch.cat([piece.flatten().to(row.dtype) for piece in pieces])  # PyTorch's own rounding
    else:
        base = torch.linspace(-2, 2, 2 * P, dtype=base_dtype)[::2]
        statistics = implementation("fill_row")(pieces, row, before, base)
        expected = (torch.cat([piece.flatten().to(base_dtype) for piece in pieces]) - base).to(row.dtype)
    flat = row.reshape(-1)
    assert torch.equal(flat[:P], expected)
    assert flat[P:].isnan().all()
    kept = expected.tolist()
    assert statistics[1:].tolist() == [min([0.5, *kept]), max([0.75, *kept])]
    exact = math.fsum([1.0, *(x * x for x in kept)])
    assert abs(statistics[0].item() - exact) <= 1e-13 * exact or math.isinf(exact)


@given(problem=vectors(), seed=st.integers(0, 99), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_non_finite_numbers_are_told(implementation, problem, seed, value):
    pieces, row = problem
    P = sum(piece.numel() for piece in pieces)
    if P == 0:
        return
    at = seed * 37 % P
    for piece in pieces:
        if 0 <= at < piece.numel():
            piece.flatten()[at] = value
        at -= piece.numel()
    norm, low, high = implementation("fill_row")(pieces, row, NOTHING).tolist()
    assert not math.isfinite(norm)
    if math.isnan(value):
        assert math.isnan(low)
        assert math.isnan(high)
    else:
        assert (low if value < 0 else high) == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_rounded_as_pytorch_does(implementation, dtype):
    """All neighbours and midpoints of all numbers of the narrow type."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype).float()
    exact = exact[exact.isfinite()]
    middle = (exact[:-1].double() + exact[1:].double()) / 2
    x = torch.cat([exact, middle.float(), torch.nextafter(middle.float(), exact[1:]), torch.tensor([3.4e38, 65520.0])])
    for values in (x, -x, x.double() * (1 + 2.0**-40)):
        row = torch.empty(1, len(values), dtype=dtype)
        implementation("fill_row")([values], row, NOTHING)
        expected = values.to(dtype)
        assert torch.equal(row[0].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("L", [4096, 16, 64 * 5])
def test_same_bits_for_any_number_of_threads_tiles_and_parts(compiled, L):
    P = 100_003
    vector = torch.randn(P, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            row = torch.zeros(-(-P // L), L)
            results.append((compiled("fill_row")([vector], row, NOTHING), row))
            pieces, statistics = torch.zeros_like(row), NOTHING
            step = 5 * STRETCH // L
            for tile in range(0, len(row), step):
                piece = vector[tile * L : (tile + step) * L]
                statistics = compiled("fill_row")([piece], pieces[tile : tile + step], statistics)
            results.append((statistics, pieces))
            whole = torch.zeros(1, P)
            assert torch.equal(compiled("fill_row")([vector], whole, NOTHING), statistics)
    finally:
        torch.set_num_threads(before)
    for statistics, row in results[1:]:
        assert torch.equal(statistics, results[0][0])
        assert torch.equal(row, results[0][1])


@pytest.mark.parametrize(
    ("values", "row", "statistics", "message"),
    [
        ([torch.ones(5)], torch.ones(2, 2), NOTHING, "do not hold"),
        ([torch.ones(2), torch.ones(2)], torch.ones(2, 4), NOTHING, "do not hold"),
        ([torch.ones(2, 2).t()], torch.ones(2, 2), NOTHING, "vectors or contiguous"),
        ([torch.ones(4).long()], torch.ones(2, 2), NOTHING, "float"),
        ([torch.ones(4)], torch.ones(2, 2).long(), NOTHING, "float"),
        ([torch.ones(4)], torch.ones(4), NOTHING, r"\[T, L\]"),
        ([torch.ones(4)], torch.ones(2, 2), NOTHING.float(), "statistics"),
        ([torch.ones(4)], torch.ones(2, 2), NOTHING[:2], "statistics"),
    ],
)
def test_refuses_what_does_not_fit(values, row, statistics, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fdcr_fast.fill_row(values, row, statistics)
