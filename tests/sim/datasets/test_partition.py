from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.partition import PartitionOptions
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.datasets.splits import PARTITIONS, partition


def dataset_of(labels: list[int]) -> Dataset:
    images = torch.zeros(len(labels), 1, 2, 2)
    targets = torch.tensor(labels, dtype=torch.int64)
    return Dataset(images, targets, images, targets, max(labels) + 1)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 5),
    clients=st.integers(1, 12),
    min_samples=st.integers(1, 10),
    spare=st.integers(0, 30),
    beta=st.sampled_from([1e-3, 0.1, 0.5, 100.0]),
    seed=st.integers(0, 3),
)
def test_every_image_goes_to_one_client_and_all_have_enough(
    classes: int, clients: int, min_samples: int, spare: int, beta: float, seed: int
) -> None:
    count = clients * min_samples + spare
    dataset = dataset_of([index % classes for index in range(count)])
    options = PartitionOptions(clients, min_samples, beta, seed)
    parts = partition("dirichlet", dataset, options)
    assert len(parts) == clients
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(count))
    assert min(map(len, parts)) >= min_samples
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    again = partition("dirichlet", dataset, options)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"5 clients with at least 10 samples each need 50 .* there are 49"):
        partition("dirichlet", dataset_of([0] * 49), PartitionOptions(5, 10, 0.5, 0))


def test_beta_sets_the_heterogeneity() -> None:
    dataset = dataset_of([index % 10 for index in range(5000)])

    def largest_class_share(beta: float) -> float:
        parts = partition("dirichlet", dataset, PartitionOptions(10, 10, beta, 0))
        counts = [torch.bincount(dataset.train_labels[part]).max().item() / len(part) for part in parts]
        return sum(counts) / len(counts)

    assert largest_class_share(1000.0) < 0.15 < 0.25 < largest_class_share(0.5) < largest_class_share(0.05)


def test_seeds_differ() -> None:
    dataset = dataset_of([index % 10 for index in range(500)])
    first, second = (partition("dirichlet", dataset, PartitionOptions(5, 10, 0.5, seed)) for seed in (0, 1))
    assert [part.tolist() for part in first] != [part.tolist() for part in second]


@pytest.mark.parametrize("clients", [3, 14])
def test_no_writer_is_spread_over_two_clients(clients: int) -> None:
    digits = load_dataset("digits")
    parts = partition("writer", digits, PartitionOptions(clients, 10, 0.5, 0))
    assert digits.writers is not None
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(len(digits.train_labels)))
    writers = [set(digits.writers[part].tolist()) for part in parts]
    assert sum(map(len, writers)) == 14
    assert set.union(*writers) == set(range(14))


def test_writer_partition_says_what_it_cannot_do() -> None:
    digits = load_dataset("digits")
    with pytest.raises(ValueError, match="14 writers are too few for 15 clients"):
        partition("writer", digits, PartitionOptions(15, 10, 0.5, 0))
    with pytest.raises(ValueError, match="only the digits"):
        partition("writer", dataset_of([0] * 100), PartitionOptions(5, 10, 0.5, 0))
    with pytest.raises(ValueError, match=r"client . has .* expected at least 102"):
        partition("writer", digits, PartitionOptions(14, 102, 0.5, 0))


def test_a_mix_is_drawn_by_every_client_for_itself() -> None:
    dataset = dataset_of([(index * 7) % 10 for index in range(300)] + [12])
    options = PartitionOptions(10**9, 99, 0.2, 5, samples_per_client=400)
    parts = partition("dirichlet-mix", dataset, options)
    assert len(parts) == 10**9
    shares = []
    for client in (0, 17, 10**9 - 1):
        rows = parts[client]
        assert torch.equal(rows, parts[client])
        assert rows.tolist() == sorted(rows.tolist())
        assert (len(rows), rows.dtype) == (400, torch.int64)
        labels = dataset.train_labels[rows]
        shares.append(torch.bincount(labels, minlength=13) / 400)
        inside = torch.bincount(rows[labels == labels.mode().values], minlength=301)
        assert (inside > 0).sum() == (dataset.train_labels == labels.mode().values).sum()
    assert (torch.stack(shares)[:, [10, 11]] == 0).all()
    assert (shares[0] - shares[1]).abs().max() > 0.1 < (shares[1] - shares[2]).abs().max()
    even = partition("dirichlet-mix", dataset, PartitionOptions(50, 1, 1e6, 5, samples_per_client=400))
    counts = sum(torch.bincount(dataset.train_labels[rows], minlength=13) for rows in even)
    present = torch.cat([counts[:10], counts[12:]]) / counts.sum()  # type: ignore[index,union-attr]
    assert ((present - 1 / 11).abs() < 5 * (1 / 11 / 20000) ** 0.5).all()
    with pytest.raises(IndexError, match="no client 50"):
        even[50]


def test_all_partitions_are_tested() -> None:
    assert set(PARTITIONS) == {"dirichlet", "writer", "dirichlet-mix"}
