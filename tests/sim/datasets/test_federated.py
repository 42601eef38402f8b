"""A user's own data, in every form in which they may come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fdcr_fast.sim import FederatedData
from fdcr_fast.sim.datasets.federated import read_set
from fdcr_fast.sim.datasets.partition import PartitionOptions
from fdcr_fast.sim.datasets.splits import partition

IMAGES, LABELS = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Pairs(Dataset[Any]):
    """A map-style data set without a shortcut."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.labels[index]


class Rows:
    """A data set of mappings, as those of Hugging Face."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"idx": index, "img": IMAGES[index].tolist(), "label": int(LABELS[index])}


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ((IMAGES, LABELS), None),
        ((IMAGES.double().numpy(), LABELS.numpy()), None),
        (TensorDataset(IMAGES, LABELS), None),
        (Pairs(IMAGES, LABELS), None),
        (Pairs(IMAGES.numpy(), LABELS.tolist()), None),
        (Subset(TensorDataset(torch.cat([IMAGES, IMAGES]), torch.cat([LABELS, LABELS])), range(12, 24)), None),
        (Rows(), ("img", "label")),
    ],
)
def test_sets_are_read(source: Any, columns: tuple[str, str] | None) -> None:
    inputs, labels = read_set(source, columns)
    assert torch.equal(inputs, IMAGES)
    assert torch.equal(labels, LABELS)


def test_data_sets_of_hugging_face_are_read() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 4]], "label": [0, 1]})
    inputs, labels = read_set(rows, ("ids", "label"))
    assert inputs.tolist() == [[1, 2], [3, 4]]
    assert labels.tolist() == [0, 1]


def test_images_are_normalised_and_tokens_stay() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    expected = pixels.transpose(0, 3, 1, 2) / 127.5 - 1
    for source in ((pixels, np.zeros(5, int)), Pairs([Image.fromarray(one) for one in pixels], [0] * 5)):
        np.testing.assert_allclose(read_set(source)[0].numpy(), expected, atol=1e-6)
    tokens, _ = read_set(Pairs([[5, 6], [7, 8]], [0, 1]))
    assert (tokens.dtype, tokens.tolist()) == (torch.int64, [[5, 6], [7, 8]])


def rows_of(data: FederatedData, clients: int) -> list[Tensor]:
    dataset = data.dataset
    return [dataset.train_images[own] for own in partition("dirichlet", dataset, PartitionOptions(clients, 1, 0.5, 0))]


def test_who_has_what() -> None:
    whole = {"test": (IMAGES, LABELS)}
    of_sets = FederatedData(train=[(IMAGES[:5], LABELS[:5]), TensorDataset(IMAGES[5:], LABELS[5:])], **whole)
    assert of_sets.num_clients == 2
    assert all(torch.equal(*pair) for pair in zip(rows_of(of_sets, 2), [IMAGES[:5], IMAGES[5:]], strict=True))
    shared = FederatedData(train=(IMAGES, LABELS), clients=[[3, 1], np.array([1]), torch.tensor([0, 11])], **whole)
    assert [len(rows) for rows in rows_of(shared, 3)] == [2, 1, 2]
    assert torch.equal(rows_of(shared, 3)[0], IMAGES[[3, 1]])
    assert FederatedData(train=(IMAGES, LABELS), **whole).dataset.owners is None
    smaller = of_sets.dataset.subset(6, None, seed=0)
    assert smaller.owners is not None
    assert all(image in IMAGES[:5] for image in smaller.train_images[smaller.owners == 0])


def test_the_fingerprint_is_that_of_all_samples() -> None:
    def digest(**changes: Any) -> str:
        return FederatedData(**{"train": [(IMAGES, LABELS)], "test": (IMAGES, LABELS), **changes}).digest

    one_bit = IMAGES.clone()
    one_bit[-1, -1, -1, -1] += 1
    digests = [
        digest(),
        digest(test=(one_bit, LABELS)),
        digest(train=(IMAGES, LABELS)),
        digest(attack_test=(IMAGES, LABELS)),
        digest(train=[(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digest()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"train": 7},
            TypeError,
            r"train: expected \(inputs, labels\) of tensors, or a data set with len\(\) and indices, got int",
        ),
        ({"train": []}, ValueError, "train: expected the set of at least one client"),
        ({"train": {0: (IMAGES, LABELS)}}, TypeError, "train: expected a list of the clients' sets, in their order"),
        (
            {"train": [(IMAGES, LABELS), (IMAGES[:, :2], LABELS)]},
            ValueError,
            "inputs of client 1 are float32 .2, 4, 4.",
        ),
        ({"train": [(IMAGES, LABELS)], "clients": [[0]]}, ValueError, "clients: train is a list of sets"),
        ({"clients": [[0], [12]]}, ValueError, "clients: client 1 has indices outside of 0..11"),
        ({"test": (IMAGES.long(), LABELS)}, ValueError, "test: inputs are int64 .3, 4, 4., those of train float32"),
        ({"test": (IMAGES, LABELS[:3])}, ValueError, "test: labels: expected 12 integer labels"),
        ({"attack_test": (IMAGES, LABELS - 1)}, ValueError, "attack_test: labels: labels must not be negative"),
        ({"train": Rows()}, ValueError, "train: samples have the columns 'idx', 'img', 'label': say which"),
        (
            {"train": Pairs([[1], [1, 2]], [0, 0])},
            ValueError,
            r"inputs differ in shape: sample 1 has \(2,\), sample 0 has \(1,\)",
        ),
        ({"train": Pairs(["a", "b"], [0, 0])}, ValueError, "expected inputs of numbers, got dtype <U1; texts are ids"),
        ({"train": [[1, 2, 3]]}, ValueError, "client 0: expected samples that are pairs"),
        (
            {"train": TensorDataset(IMAGES[:0], LABELS[:0])},
            ValueError,
            "expected inputs .N, ...., got shape .0, 3, 4, 4.",
        ),
    ],
)
def test_what_are_no_data_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ = FederatedData(**{"train": (IMAGES, LABELS), "test": (IMAGES, LABELS), **changes}).dataset
