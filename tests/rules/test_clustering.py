from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN, KMeans

from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS, dbscan, finch, kmeans
from tests.support import transcription

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on import it asks for optional packages
    from finch import FINCH

# Small integers make ties, the others make all sorts of gaps.
VALUES = st.one_of(
    st.lists(st.integers(0, 12).map(float), min_size=1, max_size=14),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=14),
    st.lists(st.floats(-3, 3).map(lambda x: 10.0**x), min_size=1, max_size=14),
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def sets(labels):
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in np.unique(labels)}


def spread(values, labels):
    values = np.asarray(values)
    return sum(((values[labels == c] - values[labels == c].mean()) ** 2).sum() for c in np.unique(labels))


@given(st.lists(st.integers(0, 40).map(float), min_size=1, max_size=14))
def test_finch_is_its_definition_with_ties(values):
    # Only the first partition: the means of later ones are rounded, which breaks their exact ties.
    assert sets(finch(tensor(values))) == set(map(frozenset, transcription.finch(values, "first")))


@settings(max_examples=200)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.sampled_from(["first", "last", 0, 1, 2, 9]))
def test_finch_is_its_definition(K, seed, partition):
    values = np.random.default_rng(seed).lognormal(0, 2, K)
    assert sets(finch(tensor(values), partition)) == set(map(frozenset, transcription.finch(values, partition)))


@pytest.mark.parametrize("seed", range(20))
def test_finch_is_the_published_package(seed):
    rng = np.random.default_rng(seed)
    # Distinct integer gaps: no ties, exact in the package's float32 distances. It stops a level early where
    # one merges a single pair, so its levels are our first ones.
    K = int(rng.integers(4, 60))
    values = np.cumsum(rng.permutation(np.arange(1, K + 1)) + rng.integers(0, 2) * K).astype(np.float64)
    values = rng.permutation(values)
    partitions, counts, _ = FINCH(values[:, None], distance="euclidean", ensure_early_exit=False)
    assert len(counts) >= 1
    for level, count in enumerate(counts):
        labels = finch(tensor(values), level)
        if count > 1:
            assert sets(labels) == sets(partitions[:, level])


def test_finch_partitions_by_hand():
    values = tensor([0.0, 1.0, 3.0, 4.0, 20.0, 21.0, 24.0, 25.5])
    assert finch(values).tolist() == finch(values, 0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert finch(values, 1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert finch(values, "last").tolist() == finch(values, 7).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_finch_ties_go_left():
    assert finch(tensor([0.0, 1.0, 2.0, 3.0])).tolist() == [0, 0, 0, 0]
    assert finch(tensor([0.0, 2.0, 4.0, 5.0])).tolist() == [0, 0, 1, 1]
    assert finch(tensor([0.0, 1.0, 3.0, 5.0, 6.0])).tolist() == [0, 0, 0, 1, 1]


@given(VALUES)
def test_kmeans_is_the_best_split(values):
    labels = kmeans(tensor(values)).numpy()
    best = transcription.labels_of(transcription.two_means(values), values)
    assert spread(values, labels) <= spread(values, best) * (1 + 1e-9)
    assert labels.max() == best.max()


@pytest.mark.parametrize("seed", range(10))
def test_kmeans_is_no_worse_than_scikit_learn(seed):
    values = np.random.default_rng(seed).lognormal(0, 1, 50)
    peer = KMeans(2, n_init=10, random_state=seed).fit(values[:, None])
    assert spread(values, kmeans(tensor(values)).numpy()) <= peer.inertia_ * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("name", CLUSTERINGS)
def test_far_groups_at_any_scale(name, scale, offset):
    values = (tensor([1.0, 1.1, 5.0, 5.1, 1.2]) + offset) * scale
    assert CLUSTERINGS[name].function(values).tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_largest_and_smallest_numbers(name):
    tiny, huge = 5e-324, 1.7e308
    assert CLUSTERINGS[name].function(tensor([tiny, 0.0, huge, huge])).tolist() == [0, 0, 1, 1]
    assert CLUSTERINGS[name].function(tensor([0.0, 0.0, tiny * 8, tiny * 8])).tolist() == [0, 0, 1, 1]


@settings(max_examples=200)
@given(
    st.integers(2, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    st.sampled_from([1, 2, 3, 5]),
)
def test_dbscan_is_scikit_learns(K, seed, eps, min_samples):
    values = np.random.default_rng(seed).lognormal(0, 1, K)
    standardised = (values - values.mean()) / values.std()
    peer = DBSCAN(eps=eps, min_samples=min_samples).fit(standardised[:, None])
    labels = dbscan(tensor(values), eps, min_samples).numpy()
    cores = np.zeros(K, dtype=bool)
    cores[peer.core_sample_indices_] = True
    # Between two clusters a border value may belong to either; everything else is determined.
    assert sets(np.where(cores, labels, -1)) == sets(np.where(cores, peer.labels_, -1))
    noise = peer.labels_ == -1
    assert len(np.unique(labels[noise])) <= 1
    assert not set(labels[noise]) & set(labels[~noise])
    for border in np.flatnonzero(~cores & ~noise):
        near = cores & (np.abs(standardised - standardised[border]) <= eps)
        assert labels[border] in labels[near]


@given(VALUES, st.randoms())
def test_labels_do_not_depend_on_the_order(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    for clustering in CLUSTERINGS.values():
        labels = clustering.function(tensor(values))
        assert torch.equal(clustering.function(tensor(values)[order]), labels[order])


@given(VALUES)
def test_labels_ascend_with_the_mean(values):
    for clustering in CLUSTERINGS.values():
        labels = clustering.function(tensor(values)).numpy()
        means = [np.mean(np.asarray(values)[labels == c]) for c in range(labels.max() + 1)]
        assert all(low <= high for low, high in itertools.pairwise(means))


@pytest.mark.parametrize("name", CLUSTERINGS)
@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [0.1] * 7, [1e300] * 3])
def test_equal_values_are_one_cluster(name, values):
    labels = CLUSTERINGS[name].function(tensor(values))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * len(values)


@pytest.mark.parametrize("name", CLUSTERINGS)
@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_values_must_be_a_finite_vector(name, values):
    with pytest.raises(ValueError, match="finite values"):
        CLUSTERINGS[name].function(tensor(values))


def test_options_are_checked():
    values = tensor([1.0, 2.0, 5.0])
    for partition in ("middle", -1, 1.5, True, None):
        with pytest.raises(ValueError, match="partition"):
            finch(values, partition)
    for eps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps"):
            dbscan(values, eps)
    with pytest.raises(ValueError, match="min_samples"):
        dbscan(values, 0.5, 0)


def test_many_values_need_no_quadratic_memory():
    values = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, 200_000))
    for clustering in CLUSTERINGS.values():
        assert clustering.function(values).max() >= 1
