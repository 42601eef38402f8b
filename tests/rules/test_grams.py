import itertools

import pytest
import torch

import fdcr_fast
from fdcr_fast import GramView, UpdateStore, estimate_gram, gram, grams
from fdcr_fast.ops.gram import GRAM_TRANSFORMS
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.readings import measured

K, P = 7, 3000


@pytest.fixture
def clients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(K, P, generator=generator), torch.rand(K, P, generator=generator) ** 4


def filled(store, updates, fishers):
    for client, (update, fisher) in enumerate(zip(updates, fishers, strict=True)):
        assert store.put(update, fisher, num_samples=10, client_id=client)
    return store


def expected(updates, fishers, transform="update", columns=slice(None)):
    low, high = fishers.double().aminmax(dim=1, keepdim=True)
    x = GRAM_TRANSFORMS[transform](updates.double(), fishers.double(), low, high)[:, columns]
    return x @ x.t()


def close(got, want, tolerance=1e-5):
    size = want.diagonal().sqrt()
    return ((got - want).abs() <= tolerance * size * size[:, None]).all()


@pytest.mark.parametrize("transform", sorted(GRAM_TRANSFORMS))
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_all_pairs(clients, transform, precision):
    G = gram(*clients, transform=transform, precision=precision)
    assert G.dtype == torch.float64
    assert close(G, expected(*clients, transform), 1e-5 if precision == "float32" else 1e-13)


def test_float64_data_are_never_rounded(clients):
    updates = clients[0].double() * (1 + 1e-12)
    assert close(gram(updates), expected(updates, updates), 1e-14)


@pytest.mark.skipif(not fdcr_fast.backends()["cpu"].usable, reason="the reference always computes in float64")
def test_precision_float64_is_another_result(clients):
    assert not torch.equal(gram(clients[0]), gram(clients[0], precision="float64"))


def test_matrices_of_any_strides_and_with_gradients(clients):
    updates, fishers = clients
    want = gram(updates, fishers, transform="fisher_update")
    wide = torch.full((K, 2 * P), torch.nan)
    wide[:, ::2] = updates
    strided = wide[:, ::2].requires_grad_()
    got = gram(strided, fishers.t().contiguous().t(), transform="fisher_update")
    assert torch.equal(got, want)
    assert not got.requires_grad


@pytest.mark.parametrize("tile", [64, 200, 10_000])
def test_a_store_in_memory_and_in_a_file_have_the_same_bits(tmp_path, tile):
    size = 10_000  # the file is read in three spans, or in one
    updates, fishers = torch.randn(K, size), torch.rand(K, size) ** 4
    ranges = [slice(10, 500), (700, size)]
    views = [GramView("fisher_update"), GramView("fourth_root_fisher", ranges)]
    memory = filled(UpdateStore(size, K, tile=tile), updates, fishers)
    resident = 3 * K * 2 * 4 * max(tile, 4300)
    file = filled(UpdateStore(size, K, tile=tile, path=tmp_path / "round", max_resident=resident), updates, fishers)
    assert len(list(file.client_updates().spans())) == (1 if tile == size else 3)
    G = grams(memory, views=views)
    assert torch.equal(G, grams(file, views=views))
    assert torch.equal(G, grams(memory.client_updates(), views=views))
    assert close(G[0], expected(updates, fishers, "fisher_update"))
    columns = torch.tensor([*range(10, 500), *range(700, size)])
    assert close(G[1], expected(updates, fishers, "fourth_root_fisher", columns))
    if tile == size:
        assert torch.equal(G, grams(updates, fishers, views=views))


def test_rejected_clients_of_a_round_are_not_read(clients):
    updates, fishers = (x.clone() for x in clients)
    updates[2, 5] = torch.nan
    fishers[4, 7] = -1.0
    screened = measured(ClientUpdates.from_matrices(updates, fishers, [10] * K)).screened(
        importance=True, norm_bound=None
    )
    assert list(screened.rejected) == [2, 4]
    kept = torch.tensor([k not in (2, 4) for k in range(K)])
    for transform in GRAM_TRANSFORMS:
        G = gram(screened, transform=transform)
        assert torch.equal(G.isnan(), ~(kept & kept[:, None]))
        assert close(G[kept][:, kept], expected(updates[kept], fishers[kept], transform))


def test_ranges_by_name_and_in_any_order(clients):
    layout = fdcr_fast.ParamLayout(("a", "b", "c"), ((10, 20), (2000,), (800,)))
    G = gram(clients[0], ranges=[layout.slices["c"], layout.slices["a"]])
    assert close(G, expected(*clients, columns=torch.tensor([*range(200), *range(2200, P)])))
    assert torch.equal(G, gram(clients[0], ranges=[(0, 200), (200, 200), slice(2200, None)]))
    assert (gram(clients[0], ranges=[]) == 0).all()
    assert torch.equal(gram(clients[0], ranges=[slice(None)]), gram(clients[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranges": [(0, 10), (9, 20)]}, ValueError, "overlap: one ends at 10, the next starts at 9"),
        ({"ranges": [(0, P + 1)]}, ValueError, rf"within {P} parameters, got \[0, {P + 1}\)"),
        ({"ranges": [(-1, 5)]}, ValueError, "within"),
        ({"ranges": [(7, 5)]}, ValueError, "within"),
        ({"ranges": [slice(0, 10, 2)]}, ValueError, "step"),
        ({"ranges": [(0.5, 5)]}, TypeError, "float"),
        ({"transform": "norm"}, ValueError, "transform must be one of .*'update'.*'norm'"),
        ({"transform": "fourth_root_fisher", "fishers": None}, ValueError, "fourth_root_fisher takes Fishers"),
        ({"precision": "bfloat16"}, ValueError, "precision"),
        ({"updates": torch.ones(K, P).int()}, TypeError, "floating-point updates"),
        ({"updates": torch.ones(P)}, ValueError, r"updates \[K, P\]"),
        ({"updates": torch.ones(0, P)}, ValueError, "at least one client"),
        ({"fishers": torch.ones(K, P - 1)}, ValueError, "fishers"),
        ({"updates": UpdateStore(P, K), "fishers": None}, ValueError, "at least one client"),
        ({"updates": UpdateStore(P, K)}, TypeError, "holds its fishers"),
    ],
)
def test_refuses_what_does_not_fit(clients, arguments, error, message):
    given = {"updates": clients[0], "fishers": clients[1], **arguments}
    with pytest.raises(error, match=message):
        gram(given.pop("updates"), given.pop("fishers"), **given)


# --- estimates from a sample


def drawn_blocks(x):
    """Products over each block of 16 parameters, [blocks, K, K]."""
    blocks = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 16)).view(len(x), -1, 16).transpose(0, 1)
    return blocks @ blocks.transpose(1, 2)


def test_estimates_are_unbiased_and_know_their_error(clients):
    updates, fishers = clients[0][:4], clients[1][:4]
    updates += 0.3 * updates[:1]  # not just noise around zero
    x = fishers.sqrt() * updates
    of_block = drawn_blocks(x)
    N, m, seeds = len(of_block), 32, 150
    variance = N**2 * (1 - m / N) * of_block.var(0) / m  # of a sum over m blocks drawn without replacement
    estimates = [
        estimate_gram(updates, fishers, transform="fisher_update", sample=m * 16, seed=seed, precision="float64")
        for seed in range(seeds)
    ]
    mean = torch.stack([estimate.value for estimate in estimates]).mean(0)
    assert ((mean - of_block.sum(0)).abs() < 5 * (variance / seeds).sqrt()).all()
    # An estimated variance with 15 degrees of freedom has a relative standard deviation of about sqrt(2 / 15).
    estimated = torch.stack([estimate.standard_error.square() for estimate in estimates]).mean(0)
    assert ((estimated / variance - 1).abs() < 5 * (2 / 15 / seeds) ** 0.5).all()


def test_a_sample_of_everything_is_exact(clients):
    for sample in (P, 10 * P):
        value, error = estimate_gram(clients[0], sample=sample)
        assert torch.equal(value, gram(clients[0]))
        assert (error == 0).all()


def test_the_seed_alone_decides_the_draw(clients, tmp_path):
    once = estimate_gram(clients[0], sample=256, seed=3)
    again = estimate_gram(clients[0], sample=256, seed=3)
    other = estimate_gram(clients[0], sample=256, seed=4)
    assert torch.equal(once.value, again.value)
    assert torch.equal(once.standard_error, again.standard_error)
    assert not torch.equal(once.value, other.value)


def test_samples_stay_in_their_ranges(clients):
    updates = clients[0].clone()
    ranges = [(5, 410), (1000, 1001), (1500, 2600)]
    inside = torch.zeros(P, dtype=torch.bool)
    for start, stop in ranges:
        inside[start:stop] = True
    updates[:, ~inside] = torch.nan
    value, error = estimate_gram(updates, sample=512, ranges=ranges)
    assert value.isfinite().all()
    assert ((value - expected(*clients, columns=inside)).abs() < 6 * error).all()


@pytest.mark.parametrize("sample", [0, -5])
def test_a_sample_must_hold_something(clients, sample):
    with pytest.raises(ValueError, match="sample must be at least 1"):
        estimate_gram(clients[0], sample=sample)


def test_distances_and_cosines_of_a_gram_matrix(clients):
    """What rules make of it."""
    updates = clients[0].double()
    G = gram(updates)
    d = G.diagonal()
    for i, j in itertools.combinations(range(K), 2):
        assert (d[i] + d[j] - 2 * G[i, j]).item() == pytest.approx(torch.dist(updates[i], updates[j]).item() ** 2)
        cosine = torch.nn.functional.cosine_similarity(updates[i], updates[j], dim=0)
        assert (G[i, j] / (d[i] * d[j]).sqrt()).item() == pytest.approx(cosine.item())
