import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast import ops
from fdcr_fast.ops.gram import GRAM_TRANSFORMS
from tests.support.operands import client_matrices, rows

TRANSFORMS = sorted(GRAM_TRANSFORMS)


def exact(transform, D, F, columns):
    """x [K, columns] in extended precision."""
    D, F = np.asarray(D, np.longdouble), np.asarray(F, np.longdouble)
    x = {
        "update": lambda: D,
        "fisher_update": lambda: np.sqrt(F) * D,
        "reweighted_update": lambda: D * (F - F.min(1, keepdims=True)) / np.ptp(F, 1, keepdims=True),
        "fourth_root_fisher": lambda: np.sqrt(np.sqrt(F)),
    }[transform]()
    return x[:, columns]


def assert_within_bound(got, x, single, pieces=1):
    """The error bound that the documentation states."""
    size, norm = abs(x) @ abs(x).T, np.sqrt((x * x).sum(1))
    bound = 1e-5 * size + 1e-18 * norm * norm[:, None] if single else (200 + pieces) * 2.0**-53 * size
    assert (abs(got.numpy() - x @ x.T) <= bound).all()


def total(K, views=1):
    return torch.zeros(views, K, K, dtype=torch.float64)


def everybody(K):
    return torch.ones(K, dtype=torch.bool)


def whole(P):
    return torch.tensor([[0, P]])


def selected(ranges, P):
    columns = np.zeros(P, bool)
    for start, stop in ranges.tolist():
        columns[start:stop] = True
    return columns


def plain(K, P, seed=0):
    generator = torch.Generator().manual_seed(seed)
    updates, fishers = torch.randn(1, K, P, generator=generator), torch.rand(1, K, P, generator=generator)
    return updates, fishers, *ops.importance_range(fishers, P)


@st.composite
def parameter_ranges(draw, P):
    bounds = sorted(draw(st.lists(st.integers(0, P), max_size=12)))
    return torch.tensor(bounds[: len(bounds) // 2 * 2], dtype=torch.int64).view(-1, 2)


@given(data=st.data(), problem=client_matrices(max_clients=19), transform=st.sampled_from(TRANSFORMS))
def test_error_is_within_the_stated_bound(implementation, data, problem, transform):
    updates, fishers, P = problem
    K, L = updates.shape[1:]
    if transform == "reweighted_update" and (np.ptp(rows(fishers, P), axis=1) == 0).any():
        return  # no importance is defined
    ranges = data.draw(st.one_of(st.just(whole(P)), parameter_ranges(P)))
    read = torch.tensor(data.draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    single = data.draw(st.booleans())
    low, high = ops.importance_range(fishers, P)
    got = implementation("gram")(updates, fishers, low, high, read, [transform], [ranges], total(K), P, single)
    assert got.dtype == torch.float64
    assert got.shape == (1, K, K)
    both = read & read[:, None]
    assert got[0][~both].isnan().all()
    x = exact(transform, rows(updates, P), rows(fishers, P), selected(ranges, P))[read.numpy()]
    single = single and torch.float64 not in (updates.dtype, fishers.dtype)
    assert_within_bound(got[0][read][:, read], x, single, pieces=-(-P // L) + P // 4096)
    assert torch.equal(got[0][read][:, read], got[0][read][:, read].t())


@pytest.mark.parametrize("K", [1, 2, 8, 23, 24, 25, 60, 300, 513])
def test_any_number_of_clients(implementation, K):
    updates, fishers, low, high = plain(K, 300)
    for transform in TRANSFORMS:
        for single in (True, False):
            args = updates, fishers, low, high, everybody(K), [transform], [whole(300)], total(K), 300, single
            got = implementation("gram")(*args)[0]
            x = GRAM_TRANSFORMS[transform](updates[0].double(), fishers[0].double(), low[:, None], high[:, None])
            d = x.norm(dim=1)
            assert ((got - x @ x.t()).abs() <= (1e-5 if single else 1e-13) * d * d[:, None]).all()


def test_many_parameters(implementation):
    """More than one task, and a last one that is short."""
    updates, fishers, low, high = plain(3, 3 * 4096 + 129)
    P = updates.shape[2]
    args = updates, fishers, low, high, everybody(3), TRANSFORMS, [whole(P)] * 4, total(3, 4), P, True
    for view, got in enumerate(implementation("gram")(*args)):
        x = exact(TRANSFORMS[view], updates[0], fishers[0], slice(None))
        assert_within_bound(got, x, True)


def test_an_element_depends_on_its_two_clients_alone(compiled):
    """Wherever they stand, and whoever else is read: the same bits."""
    updates, fishers, low, high = plain(300, 700)
    read = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.3
    for single in (True, False):
        options = (["fisher_update"], [whole(700)])
        everyone = compiled("gram")(updates, fishers, low, high, everybody(300), *options, total(300), 700, single)[0]
        some = compiled("gram")(updates, fishers, low, high, read, *options, total(300), 700, single)[0]
        assert torch.equal(some[read][:, read], everyone[read][:, read])


def test_views_do_not_depend_on_each_other(compiled):
    updates, fishers, low, high = plain(10, 20_000)
    ranges = [
        whole(20_000),
        torch.tensor([[5, 6], [100, 9000], [9000, 9001]]),
        whole(0),
        torch.tensor([[19_000, 20_000]]),
    ]
    args = updates, fishers, low, high, everybody(10)
    together = compiled("gram")(*args, TRANSFORMS, ranges, total(10, 4), 20_000, True)
    for view in range(4):
        alone = compiled("gram")(*args, [TRANSFORMS[view]], [ranges[view]], total(10), 20_000, True)
        assert torch.equal(together[view], alone[0])
    assert (together[2] == 0).all()
    assert compiled("gram")(*args, [], [], total(10, 0), 20_000, True).shape == (0, 10, 10)


@pytest.mark.parametrize("cuts", [{2}, {1, 4}, {1, 2, 3, 4}])
@pytest.mark.parametrize("tile", [64, 100, 4500])
@pytest.mark.parametrize("single", [True, False])
def test_same_bits_however_stretches_are_cut(implementation, cuts, tile, single):
    stretch = max(1, ops.STRETCH // tile)  # in tiles
    T, K, P = 5 * stretch, 9, 5 * stretch * tile - 7
    updates, fishers, low, high = plain(K, P)
    padding = torch.full((1, K, 7), torch.nan)
    updates, fishers = (torch.cat([x, padding], 2).view(K, T, tile).transpose(0, 1) for x in (updates, fishers))
    size = stretch * tile
    ranges = torch.tensor([[3, 40], [size - 5, 2 * size + 17], [3 * size, P - 1]])
    args = low, high, everybody(K), ["update", "fourth_root_fisher"]
    once = implementation("gram")(updates, fishers, *args, [ranges] * 2, total(K, 2), P, single)
    sums = total(K, 2)
    for begin, end in itertools.pairwise([0, *(stretch * cut for cut in sorted(cuts)), T]):
        first, here = begin * tile, min(P, end * tile) - begin * tile
        part = (ranges - first).clamp(0, here)
        tiles = slice(begin, end)
        sums = implementation("gram")(updates[tiles], fishers[tiles], *args, [part] * 2, sums, here, single)
    assert torch.equal(sums, once)


def test_same_bits_for_any_number_of_threads(compiled):
    updates, fishers, low, high = plain(70, 70_000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(
                compiled("gram")(
                    updates,
                    fishers,
                    low,
                    high,
                    everybody(70),
                    TRANSFORMS,
                    [whole(70_000)] * 4,
                    total(70, 4),
                    70_000,
                    False,
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-20, 1e-38, 1e-44])
def test_huge_and_tiny_rows_neither_overflow_nor_vanish(implementation, transform, size):
    K, P = 5, 1000
    updates, fishers, *_ = plain(K, P)
    updates, fishers = updates.sign() * fishers.roll(1, 2), fishers.clone()
    updates[0, 1:3] *= size
    fishers[0, 2:4] *= size
    updates[0, 4] = 0
    low, high = ops.importance_range(fishers, P)
    args = updates, fishers, low, high, everybody(K), [transform], [whole(P)], total(K), P, True
    x = exact(transform, updates[0].double(), fishers[0].double(), slice(None))
    got = implementation("gram")(*args)[0]
    assert (got.diagonal()[:4] > 0).all()
    assert_within_bound(got, x, True)


def test_a_row_with_huge_and_tiny_parts(implementation):
    """One part of a row must not lose the other: each is a range of its own."""
    updates = torch.full((1, 2, 2000), 1e-30)
    updates[0, 0, :1000] = 1e38
    ranges = [torch.tensor([[0, 1000]]), torch.tensor([[1000, 2000]]), whole(2000)]
    args = updates, None, None, None, everybody(2), ["update"] * 3, ranges, total(2, 3), 2000, True
    got = implementation("gram")(*args)
    D = updates[0].double().numpy()
    for view, part in enumerate([slice(0, 1000), slice(1000, 2000), slice(None)]):
        assert_within_bound(got[view], exact("update", D, D, part), True)


def test_nearly_equal_clients_keep_their_distance_in_float64(implementation):
    updates = torch.randn(1, 1, 5000, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1)
    updates[0, 1] += 1e-5 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    args = updates, None, None, None, everybody(2), ["update"], [whole(5000)], total(2), 5000, False
    G = implementation("gram")(*args)[0]
    true = (updates[0, 0].double() - updates[0, 1].double()).square().sum().item()
    assert (G[0, 0] + G[1, 1] - 2 * G[0, 1]).item() == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_spoils_itself_alone(implementation, value, single):
    updates, fishers, low, high = plain(40, 500)
    args = low, high, everybody(40), TRANSFORMS, [whole(500)] * 4, total(40, 4), 500, single
    clean = implementation("gram")(updates, fishers, *args)
    updates, fishers = updates.clone(), fishers.clone()
    updates[0, 7, 300], fishers[0, 9, 200] = value, value
    got = implementation("gram")(updates, fishers, *args)
    for view, transform in enumerate(TRANSFORMS):
        spoilt = torch.zeros(40, dtype=torch.bool)
        spoilt[7], spoilt[9] = transform != "fourth_root_fisher", transform != "update"
        either = spoilt | spoilt[:, None]
        assert not got[view][either].isfinite().any()
        torch.testing.assert_close(got[view][~either], clean[view][~either], rtol=1e-15, atol=0)


def test_what_a_fisher_leaves_undefined(implementation):
    updates, fishers, _, _ = plain(4, 300)
    fishers[0, 1, 17] = -1.0
    fishers[0, 2] = 0.25
    low, high = ops.importance_range(fishers, 300)
    args = updates, fishers, low, high, everybody(4), TRANSFORMS, [whole(300)] * 4, total(4, 4), 300, True
    got = dict(zip(TRANSFORMS, implementation("gram")(*args).isfinite(), strict=True))
    undefined = {"update": [], "fisher_update": [1], "fourth_root_fisher": [1], "reweighted_update": [2]}
    for transform, bad in undefined.items():
        fine = torch.ones(4, dtype=torch.bool)
        fine[bad] = False
        assert torch.equal(got[transform], fine & fine[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_transform_of_every_type(implementation, dtype):
    """Neither clients nor parameters fill blocks, and ranges begin and end anywhere."""
    K, P = 19, 101
    updates, fishers = (x.to(dtype) for x in plain(K, P)[:2])
    low, high = ops.importance_range(fishers, P)
    ranges = [whole(P), torch.tensor([[3, 36], [36, 37], [64, 101]]), torch.tensor([[16, 96]]), torch.tensor([[0, 33]])]
    args = updates, fishers, low, high, everybody(K), TRANSFORMS, ranges, total(K, 4), P, True
    for view, got in enumerate(implementation("gram")(*args)):
        x = exact(TRANSFORMS[view], updates[0].double(), fishers[0].double(), selected(ranges[view], P))
        assert_within_bound(got, x, dtype != torch.float64)


def test_nobody_and_nothing(implementation):
    updates, fishers, low, high = plain(3, 10)
    nobody = torch.zeros(3, dtype=torch.bool)
    assert (
        implementation("gram")(updates, fishers, low, high, nobody, ["update"], [whole(10)], total(3), 10, True)
        .isnan()
        .all()
    )
    empty = torch.empty(1, 0, 10)
    assert implementation("gram")(
        empty, None, None, None, everybody(0), ["update"], [whole(10)], total(0), 10, True
    ).shape == (1, 0, 0)
    none = torch.empty(0, 3, 10)
    assert (
        implementation("gram")(none, None, None, None, everybody(3), ["update"], [whole(0)], total(3), 0, True) == 0
    ).all()


def checked_reference(**arguments):
    """As where nothing is compiled."""
    return ops.gram.checked(ops.gram.reference)(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": torch.ones(3, 10)}, r"\[T, K, L\]"),
        ({"num_params": 11}, "do not hold"),
        ({"fishers": None}, "go together"),
        ({"fishers": None, "fisher_min": None, "fisher_max": None}, "Fishers"),
        ({"fishers": torch.ones(1, 4, 10)}, "shape"),
        ({"read": torch.ones(3)}, "bool"),
        ({"read": everybody(2)}, "bool"),
        ({"transforms": ["norm"]}, "unknown transform"),
        ({"transforms": ["update", "update"], "total": total(3, 2)}, "ranges for each"),
        ({"ranges": [torch.tensor([0, 10])]}, r"\[R, 2\]"),
        ({"ranges": [torch.tensor([[0.0, 10.0]])]}, "int64"),
        ({"ranges": [torch.tensor([[0, 11]])]}, "ascending"),
        ({"ranges": [torch.tensor([[-1, 5]])]}, "ascending"),
        ({"ranges": [torch.tensor([[5, 4]])]}, "ascending"),
        ({"ranges": [torch.tensor([[0, 5], [4, 6]])]}, "ascending"),
        ({"total": total(2)}, "total"),
        ({"total": total(3).float()}, "total"),
    ],
)
@pytest.mark.parametrize("call", [ops.gram, checked_reference])
def test_refuses_what_does_not_fit(call, change, message):
    updates, fishers, low, high = plain(3, 10)
    arguments = {
        "updates": updates,
        "fishers": fishers,
        "fisher_min": low,
        "fisher_max": high,
        "read": everybody(3),
        "transforms": ["fisher_update"],
        "ranges": [whole(10)],
        "total": total(3),
        "num_params": 10,
        "single": True,
    }
    with pytest.raises(RuntimeError, match=message):
        call(**{**arguments, **change})
