import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from tests.support.operands import FLOATS, client_matrices, laid_out, rows


def middle(values, keep, nearest):
    """Of one parameter, from the definition: take away what is furthest from the median, or the ends in turn."""
    x = sorted(values)
    twice = x[(len(x) - 1) // 2] + x[len(x) // 2]
    while len(x) > keep:
        if nearest:
            x.pop(0 if twice > x[0] + x[-1] else -1)  # the sum tells who is further away with one rounding
        else:
            x = x[1:-1]
    return sum(x) / keep


@st.composite
def problems(draw, max_clients=12):
    updates, _, P = draw(client_matrices(max_clients, max_params=200))
    K = updates.shape[1]
    read = torch.tensor(draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    read[draw(st.integers(0, K - 1))] = True
    if draw(st.booleans()):
        updates = (updates * 2).round() / 2  # with ties
    n = int(read.sum())
    nearest = draw(st.booleans())
    keep = draw(st.integers(1, n)) if nearest else n - 2 * draw(st.integers(0, (n - 1) // 2))
    w = torch.randn(P, generator=torch.Generator().manual_seed(P)).to(draw(st.sampled_from(FLOATS)))
    return laid_out(w, draw(st.sampled_from(["contiguous", "gapped"]))), updates, read, keep, nearest


@given(problem=problems())
def test_the_middle(implementation, problem):
    w, updates, read, keep, nearest = problem
    updates[:, ~read] = torch.nan  # never read
    D = rows(updates, len(w))[read.numpy()]
    expected = torch.tensor([middle(column.tolist(), keep, nearest) for column in D.T], dtype=torch.float64)
    expected += w.double()
    got = implementation("central_mean")(w, updates, read, keep, nearest)
    assert got.dtype == w.dtype
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if w.dtype == torch.float64 else {}
    torch.testing.assert_close(got, expected.to(w.dtype), **tolerance)


@pytest.mark.parametrize("K", [1, 2, 3, 7, 8, 9, 31, 64, 100, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_medians_are_exact_whatever_the_number_of_clients(implementation, K, dtype):
    updates = torch.randn(1, K, 37, generator=torch.Generator().manual_seed(K), dtype=dtype)
    everybody = torch.ones(K, dtype=torch.bool)
    got = implementation("central_mean")(torch.zeros(37, dtype=torch.float64), updates, everybody, 2 - K % 2, False)
    np.testing.assert_array_equal(got, np.median(updates[0].double().numpy(), axis=0))


@pytest.mark.parametrize(("K", "keep"), [(33, 33), (64, 10), (600, 400)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_trimmed_means_of_many_clients(implementation, K, keep, dtype):
    generator = torch.Generator().manual_seed(K)
    size = torch.randint(-12, 4, (K, 19), generator=generator)
    updates = torch.randn(K, 19, generator=generator, dtype=torch.float64).ldexp(size).to(dtype)
    updates[:, 0] = updates[0, 0]
    updates[K // 4 :, 1] = updates[0, 1]
    updates[::2, 2] *= 0
    read = torch.ones(K, dtype=torch.bool)
    function, w = implementation("central_mean"), torch.zeros(19, dtype=torch.float64)
    got = function(w, updates[None], read, keep, False)
    middle = updates.double().sort(0).values[(K - keep) // 2 : (K + keep) // 2]
    torch.testing.assert_close(got, middle.mean(0), rtol=1e-13, atol=1e-13)
    if dtype == torch.float32:
        order = torch.randperm(K, generator=generator)
        assert torch.equal(function(w, updates[order][None], read, keep, False), got)


@given(problem=problems(), seed=st.integers(0, 99))
def test_the_order_of_the_clients_changes_no_bit(implementation, problem, seed):
    w, updates, read, keep, nearest = problem
    order = torch.randperm(updates.shape[1], generator=torch.Generator().manual_seed(seed))
    function = implementation("central_mean")
    shuffled = function(w, updates[:, order], read[order], keep, nearest)
    assert torch.equal(function(w, updates, read, keep, nearest), shuffled)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("P", [1, 15, 16, 17, 5000])
def test_threads_and_tiles_change_no_bit(compiled, P, nearest):
    generator = torch.Generator().manual_seed(P)
    updates, w = torch.randn(11, P, generator=generator), torch.randn(P, generator=generator)
    read = torch.ones(11, dtype=torch.bool)
    function, before = compiled("central_mean"), torch.get_num_threads()
    expected = function(w, updates.unsqueeze(0), read, 5, nearest)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(function(w, updates.unsqueeze(0), read, 5, nearest), expected)
    finally:
        torch.set_num_threads(before)
    for tile in (16, 24, 1):
        padded = torch.full((11, -(-P // tile) * tile), torch.nan)
        padded[:, :P] = updates
        assert torch.equal(function(w, padded.view(11, -1, tile).transpose(0, 1), read, 5, nearest), expected)


@pytest.mark.parametrize("nearest", [False, True])
def test_extremes(implementation, nearest):
    tiny, huge = 2.0**-149, 3e38
    updates = torch.tensor([[-huge, huge, 0.0], [-huge, tiny, -0.0], [tiny, -tiny, 0.0], [huge, -huge, 0.0]])[None]
    read = torch.ones(4, dtype=torch.bool)
    got = implementation("central_mean")(torch.zeros(3, dtype=torch.float64), updates, read, 2, nearest)
    far = torch.tensor(huge).double().item()
    expected = [-far if nearest else (-far + tiny) / 2, 0.0, 0.0]
    np.testing.assert_array_equal(got, expected)
    w = torch.tensor([-3e38, 0.0, 0.0])
    got = implementation("central_mean")(w, updates, read, 2, True)
    assert got[0] == torch.finfo(torch.float32).min


def test_arguments_are_checked(implementation):
    w, updates = torch.zeros(3), torch.zeros(1, 4, 3)
    read = torch.tensor([True, True, True, False])
    for keep, nearest in ((0, False), (0, True), (2, False), (4, True), (5, False), (-1, False)):
        with pytest.raises(RuntimeError, match="keep"):
            implementation("central_mean")(w, updates, read, keep, nearest)
    for bad in (read[:3], read.double()):
        with pytest.raises(RuntimeError, match="read must be bool"):
            ops.central_mean(w, updates, bad, 1, False)
