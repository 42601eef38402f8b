from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FLOATS, laid_out

from fdcr_fast.ops import STRETCH

NOTHING = torch.tensor([0.0, math.inf, -math.inf], dtype=torch.float64)


@st.composite
def vectors(draw):
    """Pieces of one vector, an empty row for it, and how it is laid out."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4))
    scale = draw(st.sampled_from([1.0, 1e-6, 1e4]))
    pieces = [
        laid_out(
            (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(draw(st.sampled_from(FLOATS))),
            draw(st.sampled_from(["contiguous", "gapped", "offset"])),
        )
        for n in sizes
    ]
    P = sum(sizes)
    L = draw(st.sampled_from([max(P, 1), max(P // 3, 1), P + 5, 1, 16, 64, 2048, 2500]))
    dtype = draw(st.sampled_from(FLOATS))
    store = torch.full((max(-(-P // L), 1), 3, 2, L), torch.nan, dtype=dtype)
    row = store[:, 1, draw(st.integers(0, 1))]
    if draw(st.booleans()):
        row = torch.full((row.shape[1], row.shape[0]), torch.nan, dtype=dtype).t()
    return pieces, row


@given(problem=vectors())
def test_it_is_a_rounded_copy_and_its_statistics(implementation, problem):
    pieces, row = problem
    before = torch.tensor([1.0, 0.5, 0.75], dtype=torch.float64)
    statistics = implementation("fill_row")(pieces, row, before)
    expected = torch.cat([piece.to(row.dtype) for piece in pieces])  # PyTorch's own rounding
    P = len(expected)
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
    P = sum(len(piece) for piece in pieces)
    if P == 0:
        return
    at = seed * 37 % P
    for piece in pieces:
        if 0 <= at < len(piece):
            piece[at] = value
        at -= len(piece)
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
        ([torch.ones(2, 2)], torch.ones(2, 2), NOTHING, "vectors"),
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
