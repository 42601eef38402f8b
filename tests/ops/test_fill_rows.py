"""The rows of many clients at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.operands import vectors


@given(problem=vectors(), clients=st.integers(1, 4), wide=st.booleans(), with_base=st.booleans())
def test_rows_of_many_clients_less_a_base(implementation, problem, clients, wide, with_base):
    pieces, row = problem
    P = sum(piece.numel() for piece in pieces)
    rows = torch.full((row.shape[0], clients, row.shape[1]), torch.nan, dtype=row.dtype)
    base = torch.linspace(-1, 1, P, dtype=torch.float64 if wide else torch.float32) if with_base else None
    vectors = [[piece * (k + 1) for piece in pieces] for k in range(clients)]
    implementation("fill_rows")([piece for vector in vectors for piece in vector], rows, base)
    for k, vector in enumerate(vectors):
        expected = torch.cat([x.flatten().to(row.dtype if base is None else base.dtype) for x in vector])
        expected = expected if base is None else (expected - base).to(row.dtype)
        flat = rows[:, k].reshape(-1)
        assert torch.equal(flat[:P], expected)
        assert flat[P:].isnan().all()


def test_rows_have_the_same_bits_for_any_number_of_threads(compiled):
    P, clients = 50_001, 5
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(P // 3, generator=generator) for _ in range(3 * clients)]
    base = torch.randn(P, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            rows = torch.zeros(-(-P // 64), clients, 64)
            compiled("fill_rows")(values, rows, base)
            results.append(rows)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(rows, results[0]) for rows in results)
    expected = torch.cat(values).view(clients, P) - base
    assert torch.equal(results[0].transpose(0, 1).flatten(1)[:, :P], expected)


@pytest.mark.parametrize(
    ("values", "rows", "base", "message"),
    [
        ([torch.ones(5)], torch.ones(1, 2, 4), None, "vectors of one length"),
        ([torch.ones(4)], torch.ones(1, 0, 4), None, "vectors of one length"),
        ([torch.ones(8)], torch.ones(1, 4), None, r"\[T, K, L\]"),
        ([torch.ones(8)], torch.ones(1, 2, 3), None, "do not hold"),
        ([torch.ones(8)], torch.ones(1, 2, 4), torch.ones(8), "base must"),
        ([torch.ones(8)], torch.ones(1, 2, 4), torch.ones(4).half(), "base must"),
    ],
)
def test_refuses_rows_that_do_not_fit(values, rows, base, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fdcr_fast.fill_rows(values, rows, base)
