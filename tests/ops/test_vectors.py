"""Clients' vectors that are aggregated where they came."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import FLOATS, laid_out, vectors


def cut(matrix, cuts, layout="contiguous", dtypes=(torch.float32,)):
    """The rows of a matrix in pieces, one after the other, each in another memory and some in two dimensions."""
    pieces = []
    for k, row in enumerate(matrix):
        for i, piece in enumerate(row.tensor_split(cuts[k % len(cuts)])):
            piece = laid_out(piece.to(dtypes[(k + i) % len(dtypes)]).clone(), layout)
            pieces.append(piece.view(-1, 3) if len(piece) % 3 == 0 and piece.is_contiguous() else piece)
    return pieces


@st.composite
def rounds(draw):
    """Pieces of updates and Fishers with another cut for every client, and the base, or None."""
    K, P = draw(st.integers(1, 20)), draw(st.sampled_from([1, 31, 32, 33, 500, 4096, 4099, 9001]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lists = st.lists(st.integers(0, P), max_size=5).map(sorted)
    cuts = draw(st.lists(lists, min_size=1, max_size=K))
    layout = draw(st.sampled_from(["contiguous", "contiguous", "gapped", "offset"]))
    dtypes = draw(st.sampled_from([(torch.float32,), (torch.float32, torch.bfloat16), tuple(FLOATS)]))
    base = torch.randn(P, generator=generator) if draw(st.booleans()) else None
    if base is not None:
        base = laid_out(base, draw(st.sampled_from(["contiguous", "gapped"])))
    updates = cut(torch.randn(K, P, generator=generator), cuts, layout, dtypes)
    fishers = cut(torch.rand(K, P, generator=generator), cuts[::-1], layout, dtypes)
    return K, P, updates, fishers, base, torch.randn(P, generator=generator)


def filled(pieces, K, P, base=None):
    rows = torch.empty(1, K, P)
    ops.fill_rows(pieces, rows, base)
    return rows


@given(
    problem=rounds(),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["scores", "mean", "both", "norms"]),
    reweight=st.booleans(),
    rescale=st.booleans(),
    single=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_the_bits_of_rows_that_were_copied(compiled, problem, seed, kind, reweight, rescale, single, dtype):
    K, P, updates, fishers, base, w = problem
    rescale &= kind != "norms"
    generator = torch.Generator().manual_seed(seed)
    alpha, weights = (torch.rand(K, generator=generator, dtype=torch.float64) for _ in range(2))
    weights[torch.rand(K, generator=generator) < 0.3] = 0
    u, F, w = filled(updates, K, P, base), filled(fishers, K, P), w.to(dtype)
    ranges = ops.importance_range(F, P)
    plain = (None, None, None)
    own, copied = ((fishers, *ranges), (F, *ranges)) if reweight or rescale else (([], None, None), plain)
    totals = torch.rand(K if kind == "norms" else 2 * K + 1, generator=generator, dtype=torch.float64)
    if kind == "mean":
        totals = totals[:0]
    got = compiled("aggregate_vectors")(
        w if kind != "scores" else None,
        updates,
        base,
        *own,
        alpha if kind in ("scores", "both") else None,
        weights if kind != "scores" else None,
        totals,
        reweight,
        rescale,
        single,
    )
    nothing = torch.zeros(0, dtype=torch.float64)
    if kind == "scores":
        scores = compiled("discrepancy")(u, *(copied if reweight else plain), alpha, totals, P, single)
        expected = scores, nothing
    elif kind == "mean":
        expected = nothing, compiled("rescaled_mean")(w, u, *(copied if rescale else plain), weights, single)
    elif kind == "norms":
        expected = compiled("norms_and_mean")(w, u, weights, totals, single)
    else:
        expected = compiled("discrepancy_and_mean")(w, u, *copied, alpha, weights, totals, reweight, rescale, single)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@given(problem=rounds(), reweight=st.booleans(), rescale=st.booleans())
def test_against_float64_written_down_from_the_paper(implementation, problem, reweight, rescale):
    K, P, updates, fishers, base, w = problem
    shares = torch.arange(1, K + 1, dtype=torch.float64) / sum(range(1, K + 1))
    delta, F = (torch.cat([piece.flatten().float() for piece in pieces]).view(K, P) for pieces in (updates, fishers))
    delta = delta - (0 if base is None else base)
    low, high = F.double().amin(1) - 0.25, F.double().amax(1) + 0.25
    importance = (F.double() - low[:, None]) / (high - low)[:, None]
    u = delta.double() * (importance if reweight else 1)
    mean = shares @ u
    factor = 2 / (1 + torch.exp(-importance)) if rescale else torch.ones_like(importance)
    totals, params = implementation("aggregate_vectors")(
        w,
        updates,
        base,
        *((fishers, low, high) if reweight or rescale else ([], None, None)),
        shares,
        shares,
        torch.zeros(2 * K + 1, dtype=torch.float64),
        reweight,
        rescale,
        False,
    )
    expected = torch.cat([(mean - u).square().sum(1), delta.double().square().sum(1), mean.square().sum()[None]])
    torch.testing.assert_close(totals, expected, rtol=1e-9, atol=1e-12 * P)
    torch.testing.assert_close(params.double(), w.double() + shares @ (factor * delta.double()), rtol=1e-6, atol=1e-6)


def test_same_bits_for_any_number_of_threads(compiled):
    K, P = 7, 70_001
    generator = torch.Generator().manual_seed(0)
    updates = cut(torch.randn(K, P, generator=generator), [[5, 4100, 33_333], [], [69_999]])
    fishers = cut(torch.rand(K, P, generator=generator), [[40_000], [1]])
    low, high = torch.zeros(K, dtype=torch.float64), torch.ones(K, dtype=torch.float64)
    base, alpha = torch.randn(P, generator=generator), torch.full((K,), 1 / K, dtype=torch.float64)
    totals, before, results = torch.zeros(2 * K + 1, dtype=torch.float64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            call = (base, updates, base, fishers, low, high, alpha, alpha, totals, True, True, True)
            results.append(compiled("aggregate_vectors")(*call))
    finally:
        torch.set_num_threads(before)
    for scores, params in results:
        assert torch.equal(scores, results[0][0])
        assert torch.equal(params, results[0][1])


@given(problem=vectors(), clients=st.integers(1, 6))
def test_ranges_of_vectors(implementation, problem, clients):
    pieces, _ = problem
    numbers = torch.cat([piece.flatten().double() for piece in pieces])
    pieces = [*pieces, torch.zeros(-len(numbers) % clients)]  # some lie in the vectors of two clients
    rows = torch.cat([numbers, pieces[-1]]).view(clients, -1)
    if rows.numel() == 0:
        with pytest.raises(RuntimeError, match="no numbers"):
            ops.vector_range(pieces, clients)
        return
    got = implementation("vector_range")(pieces, clients)
    for x, expected in zip(got, (rows.amin(1), rows.amax(1)), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "clients", "message"),
    [
        ([torch.ones(5)], 2, "vectors of one length"),
        ([torch.ones(5)], 0, "vectors of one length"),
        ([torch.ones(4, 2).t()], 2, "vectors or contiguous"),
        ([torch.ones(4).long()], 2, "float"),
    ],
)
def test_no_range_of_what_does_not_fit(values, clients, message):
    with pytest.raises(RuntimeError, match=message):
        ops.vector_range(values, clients)


@pytest.mark.parametrize("piece", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_range_tells_non_finite_numbers(implementation, piece, value):
    pieces = [torch.ones(3), torch.ones(4097), torch.ones(1)]
    pieces[piece][-1] = value
    others = [torch.full((4101,), 2.0)]
    (one, low), (other, high) = (x.tolist() for x in implementation("vector_range")(others + pieces, 2))
    assert (math.isnan(low) and math.isnan(high)) if math.isnan(value) else value in (low, high)
    assert one == other == 2


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None, "alpha": None}, "must be given"),
        ({"updates": [torch.ones(5)]}, "vectors of one length"),
        ({"updates": [torch.ones(2, 2).t()]}, "vectors or contiguous"),
        ({"updates": [torch.ones(4).long()]}, "float"),
        ({"global_params": torch.ones(3)}, "global_params"),
        ({"global_params": None}, "global_params"),
        ({"base": torch.ones(2).double()}, "base must"),
        ({"base": torch.ones(3)}, "base must"),
        ({"fishers": []}, "go together"),
        ({"fishers": [torch.ones(6)]}, "fishers (have 6|differ in length)"),
        ({"fisher_min": ONE}, "fisher_min must"),
        ({"totals": ONE}, "totals must"),
        ({"alpha": None, "totals": torch.ones(2).double()}, "plain mean alone"),
        ({"fishers": [], "fisher_min": None, "fisher_max": None}, "importances need"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    two = torch.ones(2, dtype=torch.float64)
    arguments = {
        "global_params": torch.ones(2),
        "updates": [torch.ones(4)],
        "base": torch.ones(2),
        "fishers": [torch.ones(3), torch.ones(1)],
        "fisher_min": two,
        "fisher_max": two + 1,
        "alpha": two,
        "weights": two,
        "totals": torch.zeros(5, dtype=torch.float64),
        "reweight": True,
        "rescale": True,
        "single": False,
    }
    ops.aggregate_vectors(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        ops.aggregate_vectors(*{**arguments, **change}.values())
