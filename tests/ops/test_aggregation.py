import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import _native, ops
from fdcr_fast.ops.operator import OPERATORS
from tests.support.operands import FLOATS, client_matrices, laid_out, relative_error, rows


def importance(F):
    low, high = F.min(1, keepdims=True), F.max(1, keepdims=True)
    return (F - low) / (high - low)


def weights_for(K, seed, zeros):
    w = np.random.default_rng(seed).random(K) + 0.1
    if zeros and K > 1:
        w[seed % K] = 0
    return w / w.sum()


@given(problem=client_matrices())
def test_range_and_norm(implementation, problem):
    updates, fishers, P = problem
    low, high = implementation("importance_range")(fishers, P)
    F = rows(fishers, P)
    assert low.dtype == high.dtype == torch.float64
    np.testing.assert_array_equal(low, F.min(1))
    np.testing.assert_array_equal(high, F.max(1))
    norm = implementation("squared_norm")(updates, P)
    np.testing.assert_allclose(norm, (rows(updates, P) ** 2).sum(1), rtol=1e-12)


@given(problem=client_matrices(), seed=st.integers(0, 99), zeros=st.booleans(), reweighted=st.booleans())
def test_discrepancy(implementation, problem, seed, zeros, reweighted):
    updates, fishers, P = problem
    D, F = rows(updates, P), rows(fishers, P)
    alpha = weights_for(len(D), seed, zeros)
    options = (None, None, None)
    u = D
    if reweighted:
        if (F.max(1) == F.min(1)).any():
            return  # no importance is defined: the rules reject such clients
        u = importance(F) * D
        options = (fishers, *implementation("importance_range")(fishers, P))
    expected = ((alpha @ u - u) ** 2).sum(1)
    so_far = torch.rand(2 * len(D) + 1, dtype=torch.float64)
    totals = implementation("discrepancy")(updates, *options, torch.tensor(alpha), so_far, P, False) - so_far
    got, norm, mean_square = np.split(totals.numpy(), [len(D), 2 * len(D)])
    assert np.isnan(got[alpha == 0]).all()
    assert np.isnan(norm[alpha == 0]).all()
    read = alpha != 0
    np.testing.assert_allclose(norm[read], (D[read] ** 2).sum(1), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(mean_square[0], ((alpha @ u) ** 2).sum(), rtol=1e-9, atol=1e-14)
    scale = (u[read] ** 2).sum() + 1e-300
    assert np.abs(got[read] - expected[read]).max() / scale < 1e-12


@given(
    problem=client_matrices(),
    seed=st.integers(0, 99),
    zeros=st.booleans(),
    rescaled=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    strided=st.booleans(),
)
def test_rescaled_mean(implementation, problem, seed, zeros, rescaled, dtype, strided):
    updates, fishers, P = problem
    D, F = rows(updates, P), rows(fishers, P)
    weights = weights_for(len(D), seed, zeros)
    w = torch.randn(P, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w = laid_out(w, "gapped") if strided else w
    factor, options = 1.0, (None, None, None)
    if rescaled:
        if (F.max(1) == F.min(1)).any():
            return
        factor = 2 / (1 + np.exp(-importance(F)))
        options = (fishers, *implementation("importance_range")(fishers, P))
    expected = w.double().numpy() + weights @ (factor * D)
    got = implementation("rescaled_mean")(w, updates, *options, torch.tensor(weights), False)
    assert got.dtype == dtype
    eps = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative_error(got.double(), expected) < eps


def zeros(n):
    return torch.zeros(n, dtype=torch.float64)


def test_no_row_of_weight_zero_is_read(implementation):
    updates, fishers = torch.ones(1, 3, 10), torch.rand(1, 3, 10)
    updates[:, 1] = torch.nan
    fishers[:, 1] = torch.nan
    weights = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    low, high = implementation("importance_range")(fishers, 10)
    for single in (False, True):
        score = implementation("discrepancy")(updates, fishers, low, high, weights, zeros(7), 10, single)
        assert score.isnan().tolist() == [False, True, False] * 2 + [False]
        result = implementation("rescaled_mean")(torch.zeros(10), updates, fishers, low, high, weights, single)
        assert result.isfinite().all()


@pytest.mark.parametrize("position", [0, 5, 2047, 2048, 4999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_range_and_norm_tell_non_finite_values(implementation, position, value):
    x = torch.rand(1, 2, 5000)
    x[0, 1, position] = value
    low, high = implementation("importance_range")(x, 5000)
    bad = value if value == value else None
    if bad is None:
        assert low[1].isnan()
        assert high[1].isnan()
    else:
        assert low[1] == min(bad, x[0, 1].min())
        assert high[1] == max(bad, x[0, 1].max())
    assert low[0].isfinite()
    assert not implementation("squared_norm")(x, 5000)[1].isfinite()


def test_infinity_and_nan_in_one_row(implementation):
    x = torch.rand(1, 1, 300)
    x[0, 0, 17], x[0, 0, 200] = torch.inf, torch.nan
    low, high = implementation("importance_range")(x, 300)
    assert low.isnan().all()
    assert high.isnan().all()


def test_huge_beside_small_updates_stay_finite(implementation):
    updates = torch.full((1, 3, 100), 1e-3)
    updates[0, 0] = 3e38
    updates[0, 1] = -3e38
    alpha = torch.full((3,), 1 / 3, dtype=torch.float64)
    score = implementation("discrepancy")(updates, None, None, None, alpha, zeros(7), 100, False)
    assert score.isfinite().all()
    np.testing.assert_allclose(score[0], 100 * 3e38**2, rtol=1e-6)


def test_denormal_fishers_have_an_importance(implementation):
    fishers = torch.tensor([[[0.0, 1e-45, 2.8e-45]]])
    low, high = implementation("importance_range")(fishers, 3)
    w = implementation("rescaled_mean")(
        torch.zeros(3), torch.ones(1, 1, 3), fishers, low, high, torch.ones(1, dtype=torch.float64), False
    )
    np.testing.assert_allclose(w, [1, 2 / (1 + np.exp(-0.5)), 2 / (1 + np.exp(-1))], rtol=1e-6)


def round_of(K, P, L, dtype, seed=0):
    """Updates and Fishers as a store holds them, their ranges, and shares; Fishers may lie close together."""
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-P // L)
    data = torch.rand(tiles, K, 2, L, generator=generator)
    data[:, :, 1] = torch.randn(tiles, K, L, generator=generator) * torch.rand(K, 1, generator=generator)
    data = data.to(dtype)
    fishers, updates = data.unbind(2)
    alpha = torch.rand(K, generator=generator, dtype=torch.float64)
    return updates, fishers, *ops.importance_range(fishers, P), alpha / alpha.sum()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("P", "L"), [(3 * 4096 + 77, 16), (9001, 5), (14001, 14001)])
def test_same_bits_for_any_number_of_threads(compiled, single, P, L):
    updates, fishers, *_, weights = round_of(19, P, L, torch.float32)
    w = torch.randn(P)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            importances = (fishers, *compiled("importance_range")(fishers, P))
            both = compiled("discrepancy_and_mean")(
                w, updates, *importances, weights, weights, zeros(39), True, True, single
            )
            plain = compiled("norms_and_mean")(w, updates, weights, zeros(19), single)
            results.append(torch.cat([compiled("squared_norm")(updates, P), *both, *plain]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@given(
    seed=st.integers(0, 2**31),
    K=st.integers(1, 40),
    P=st.integers(1, 9000),
    L=st.sampled_from([5, 8, 16, 100, 10_000]),
    dtype=st.sampled_from(FLOATS),
    single=st.booleans(),
    reweight=st.booleans(),
    rescale=st.booleans(),
)
def test_one_reading_gives_the_bits_of_two(implementation, seed, K, P, L, dtype, single, reweight, rescale):
    single = single and dtype != torch.float64
    updates, fishers, low, high, alpha = round_of(K, P, L, dtype, seed)
    if (low == high).any():
        return
    generator = torch.Generator().manual_seed(seed)
    weights = torch.where(torch.rand(K, generator=generator) < 0.3, 0.0, alpha)
    w, totals = torch.randn(P, generator=generator), torch.rand(2 * K + 1, generator=generator, dtype=torch.float64)
    importances, none = (fishers, low, high), (None, None, None)
    read = importances if reweight or rescale else none
    scores, params = implementation("discrepancy_and_mean")(
        w, updates, *read, alpha, weights, totals, reweight, rescale, single
    )
    alone = implementation("discrepancy")(updates, *(importances if reweight else none), alpha, totals, P, single)
    assert torch.equal(scores, alone)
    alone = implementation("rescaled_mean")(w, updates, *(importances if rescale else none), weights, single)
    assert torch.equal(params, alone)


@given(
    seed=st.integers(0, 2**31),
    K=st.integers(1, 40),
    P=st.integers(1, 9000),
    L=st.sampled_from([5, 8, 16, 100, 10_000]),
    dtype=st.sampled_from(FLOATS),
    single=st.booleans(),
)
def test_norms_beside_the_mean(compiled, seed, K, P, L, dtype, single):
    single = single and dtype != torch.float64
    updates, *_, alpha = round_of(K, P, L, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.where(torch.rand(K, generator=generator) < 0.3, 0.0, alpha)
    w, totals = torch.randn(P, generator=generator), torch.rand(2 * K + 1, generator=generator, dtype=torch.float64)
    D = rows(updates, P)
    expected = (D**2).sum(1) + totals[K:-1].numpy()
    for norms_and_mean in (compiled("norms_and_mean"), OPERATORS["norms_and_mean"].reference):
        norms, params = norms_and_mean(w, updates, weights, totals[K:-1], single)
        np.testing.assert_allclose(norms, np.where(weights != 0, expected, np.nan), rtol=1e-6 if single else 1e-12)
        np.testing.assert_allclose(params, w.double().numpy() + weights.numpy() @ D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("K", "L"), [(1, 16), (17, 16), (40, 20_000)])
def test_norms_beside_the_mean_have_the_bits_of_other_readings(compiled, single, K, L):
    P = 20_000
    updates, *_, weights = round_of(K, P, L, torch.float32)
    weights[K // 2] = 0.0
    w, totals = torch.randn(P), torch.rand(2 * K + 1, dtype=torch.float64)
    norms, params = compiled("norms_and_mean")(w, updates, weights, totals[K:-1], single)
    scores = compiled("discrepancy")(updates, None, None, None, weights, totals, P, single)
    torch.testing.assert_close(norms, scores[K:-1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(params, compiled("rescaled_mean")(w, updates, None, None, None, weights, single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "L"), [(3, 16), (40, 16), (70, 20_000), (17, 24)])
def test_single_precision_products_are_as_right_as_stated(compiled, dtype, K, L):
    P = 20_000
    updates, fishers, low, high, alpha = round_of(K, P, L, dtype)
    w = torch.randn(P, dtype=torch.float64)
    D, F = rows(updates, P), rows(fishers, P)
    I = importance(F)  # noqa: E741
    u = I * D
    expected = ((alpha.numpy() @ u - u) ** 2).sum(1)
    for reweight, rescale in ((True, True), (True, False)):
        totals, params = compiled("discrepancy_and_mean")(
            w, updates, fishers, low, high, alpha, alpha, zeros(2 * K + 1), reweight, rescale, True
        )
        np.testing.assert_allclose(totals[:K], expected, rtol=1e-6)
        np.testing.assert_allclose(totals[K:-1], (D**2).sum(1), rtol=1e-6)
        step = alpha.numpy() @ ((2 / (1 + np.exp(-I)) if rescale else 1) * D)
        assert relative_error(params - w, step) < 3e-7


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("tile", [16, 4096, 5000])
def test_spans_give_the_bits_of_the_whole(compiled, single, tile):
    K, P = 7, 100_000 // tile * tile
    updates, fishers, low, high, alpha = round_of(K, P, tile, torch.float32)
    whole = compiled("discrepancy")(updates, fishers, low, high, alpha, zeros(2 * K + 1), P, single)
    tiles = max(1, ops.STRETCH // tile)
    for step in (tiles, 2 * tiles, 3 * tiles):
        totals = zeros(2 * K + 1)
        for first in range(0, len(updates), step):
            part = slice(first, first + step)
            size = len(updates[part]) * tile
            totals = compiled("discrepancy")(updates[part], fishers[part], low, high, alpha, totals, size, single)
        assert torch.equal(totals, whole)


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_beyond_the_largest_number_become_it(implementation, dtype):
    largest = torch.finfo(dtype).max
    updates = torch.tensor([[[largest, -largest, 1.0]]], dtype=dtype)
    w = updates[0, 0].clone()
    one = torch.ones(1, dtype=torch.float64)
    result = implementation("rescaled_mean")(w, updates, None, None, None, one, False)
    assert result.tolist() == [largest, -largest, 2.0]


def test_rows_longer_than_32_bits_of_elements_are_indexed(compiled):
    # One number seen P times: nothing of it needs memory but the last, real rows.
    P = 2**31 + 40
    x = torch.tensor([2.0]).expand(1, 2, P)
    low, high = compiled("importance_range")(x[:, :1], P)
    assert (low.item(), high.item()) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, a: ops.discrepancy(u[0], None, None, None, a, zeros(5), 10, False), r"\[T, K, L\]"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a, zeros(5), 11, False), "do not hold"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a.float(), zeros(5), 10, False), "float64"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a[:1], zeros(5), 10, False), "float64"),
        (lambda u, a: ops.discrepancy(u, u, None, None, a, zeros(5), 10, False), "go together"),
        (lambda u, a: ops.discrepancy(u, u[:, :1], a, a, a, zeros(5), 10, False), "shape"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a, zeros(4), 10, False), r"totals must be float64 \[5\]"),
        (lambda u, a: ops.discrepancy(u.double(), None, None, None, a, zeros(5), 10, True), "single"),
        (lambda u, a: ops.rescaled_mean(torch.zeros(9, 1), u, None, None, None, a, False), "global_params"),
        (lambda u, a: ops.rescaled_mean(torch.zeros(11), u, None, None, None, a, False), "do not hold"),
        (
            lambda u, a: ops.discrepancy_and_mean(
                torch.zeros(10), u, None, None, None, a, a, zeros(5), True, False, False
            ),
            "importances need fishers",
        ),
        (lambda u, a: ops.squared_norm(u.long(), 10), "float"),
        (lambda u, a: ops.importance_range(u[:, :, :0], 0), "undefined"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(1, 2, 10), torch.full((2,), 0.5, dtype=torch.float64))


def test_memory_does_not_grow_with_the_clients():
    code = """
import ctypes, pathlib, sys, torch
from fdcr_fast import _native, ops
from fdcr_fast.ops.operator import OPERATORS

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

K, P = 100_000, 4096 + 16
fishers, updates = torch.rand(P // 16, 1, 2, 16).expand(-1, K, -1, -1).unbind(2)
low, high, alpha = torch.zeros(K).double(), torch.ones(K).double(), torch.full((K,), 1 / K).double()
totals, w = torch.zeros(2 * K + 1).double(), torch.zeros(P)
importances = (fishers[:1], low, high)
ops.discrepancy_and_mean(w[:16], updates[:1], *importances, alpha, alpha, totals, True, True, True)
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
ops.discrepancy_and_mean(w, updates, fishers, low, high, alpha, alpha, totals, True, True, True)
print(status("VmHWM") - before)
"""
    if not _native.loaded or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs the extension and Linux")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer takes memory of its own")
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 800 * 100_000 >> 10  # KiB; the fishers and updates would take 3 GiB
