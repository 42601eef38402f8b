import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FLOATS, client_matrices, laid_out, relative_error, rows

from fdcr_fast import ops


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
    got = implementation("discrepancy")(updates, *options, torch.tensor(alpha), P).numpy()
    assert np.isnan(got[alpha == 0]).all()
    read = alpha != 0
    scale = (u[read] ** 2).sum() + 1e-300
    assert np.abs(got[read] - expected[read]).max() / scale < 1e-13


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
    got = implementation("rescaled_mean")(w, updates, *options, torch.tensor(weights))
    assert got.dtype == dtype
    eps = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative_error(got.double(), expected) < eps


def test_no_row_of_weight_zero_is_read(implementation):
    updates, fishers = torch.ones(1, 3, 10), torch.rand(1, 3, 10)
    updates[:, 1] = torch.nan
    fishers[:, 1] = torch.nan
    weights = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    low, high = implementation("importance_range")(fishers, 10)
    score = implementation("discrepancy")(updates, fishers, low, high, weights, 10)
    assert score.isnan().tolist() == [False, True, False]
    result = implementation("rescaled_mean")(torch.zeros(10), updates, fishers, low, high, weights)
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
    score = implementation("discrepancy")(updates, None, None, None, alpha, 100)
    assert score.isfinite().all()
    np.testing.assert_allclose(score[0], 100 * 3e38**2, rtol=1e-6)


def test_denormal_fishers_have_an_importance(implementation):
    fishers = torch.tensor([[[0.0, 1e-45, 2.8e-45]]])
    low, high = implementation("importance_range")(fishers, 3)
    w = implementation("rescaled_mean")(
        torch.zeros(3), torch.ones(1, 1, 3), fishers, low, high, torch.ones(1, dtype=torch.float64)
    )
    np.testing.assert_allclose(w, [1, 2 / (1 + np.exp(-0.5)), 2 / (1 + np.exp(-1))], rtol=1e-6)


def test_same_bits_for_any_number_of_threads(compiled):
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(3, 7, 5000, generator=generator)
    fishers = torch.rand(3, 7, 5000, generator=generator)
    P, weights = 14001, torch.rand(7, generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            low, high = compiled("importance_range")(fishers, P)
            results.append(
                torch.cat(
                    [
                        compiled("squared_norm")(updates, P),
                        compiled("discrepancy")(updates, fishers, low, high, weights, P),
                        compiled("rescaled_mean")(
                            torch.zeros(P, dtype=torch.float64), updates, fishers, low, high, weights
                        ),
                    ]
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, a: ops.discrepancy(u[0], None, None, None, a, 10), r"\[T, K, L\]"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a, 11), "do not hold"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a.float(), 10), "float64"),
        (lambda u, a: ops.discrepancy(u, None, None, None, a[:1], 10), "float64"),
        (lambda u, a: ops.discrepancy(u, u, None, None, a, 10), "go together"),
        (lambda u, a: ops.discrepancy(u, u[:, :1], a, a, a, 10), "shape"),
        (lambda u, a: ops.rescaled_mean(torch.zeros(9, 1), u, None, None, None, a), "global_params"),
        (lambda u, a: ops.rescaled_mean(torch.zeros(11), u, None, None, None, a), "do not hold"),
        (lambda u, a: ops.squared_norm(u.long(), 10), "float"),
        (lambda u, a: ops.importance_range(u[:, :, :0], 0), "undefined"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(1, 2, 10), torch.full((2,), 0.5, dtype=torch.float64))
