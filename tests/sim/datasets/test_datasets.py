from __future__ import annotations

import bz2
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fdcr_fast.sim.datasets import readers
from fdcr_fast.sim.datasets.readers import DATASETS, load_dataset
from tests.support.tiny import write_npz


def test_digits_are_split_by_class_and_keep_their_order() -> None:
    digits, original = load_dataset("digits"), load_digits()
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert digits.train_images.dtype == torch.float32
    assert (digits.train_images.min(), digits.train_images.max()) == (-1, 1)
    seen: dict[int, int] = {}
    train, test = [], []
    for index, label in enumerate(original.target):
        seen[label] = seen.get(label, 0) + 1
        (test if seen[label] % 5 == 0 else train).append(index)
    for rows, images, labels in (
        (train, digits.train_images, digits.train_labels),
        (test, digits.test_images, digits.test_labels),
    ):
        np.testing.assert_allclose(images[:, 0].numpy(), original.images[rows] / 8 - 1, atol=1e-6)
        np.testing.assert_array_equal(labels.numpy(), original.target[rows])
    chunks = np.array_split(np.arange(len(original.target)), 14)
    assert digits.writers is not None
    for row, writer in zip(train[::37], digits.writers.tolist()[::37], strict=True):
        assert abs(row - chunks[writer].mean()) < len(original.target) / 14
    assert digits.writers.diff().ge(0).all()
    assert digits.writers.unique().tolist() == list(range(14))


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (9, 12, 3)])
def test_npz_images_are_normalised_to_nchw(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_npz(tmp_path / "data.npz", shape)
    dataset = load_dataset(str(path))
    pixels = np.load(path)["x_train"].reshape(60, *shape[:2], -1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(dataset.train_images.numpy(), pixels / 127.5 - 1, atol=1e-6)
    assert dataset.num_classes == 3
    assert dataset.writers is None


def test_float_images_span_zero_to_one_or_minus_one_to_one(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((60, 16, 16))
    for low, name in ((0.0, "unit"), (-1.0, "signed")):
        values = images if low == 0 else 2 * images - 1
        path = write_npz(tmp_path / f"{name}.npz", x_train=values, x_test=values[:20])
        np.testing.assert_allclose(load_dataset(str(path)).train_images[:, 0].numpy(), 2 * images - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": None}, "missing arrays y_test"),
        ({"y_train": np.zeros(59, dtype=int)}, "y_train: expected 60 integer labels"),
        ({"y_train": np.zeros(60)}, "y_train: expected 60 integer labels"),
        ({"y_train": np.full(60, -1)}, "must not be negative"),
        ({"y_test": np.full(20, 7)}, "y_test has label 7"),
        ({"x_train": np.zeros((60, 16))}, "expected images of shape"),
        ({"x_train": np.zeros((0, 16, 16)), "y_train": np.zeros(0, dtype=int)}, "expected images of shape"),
        ({"x_train": np.full((60, 16, 16), 3.0)}, r"expected floats in \[0, 1\]"),
        ({"x_train": np.full((60, 16, 16), np.nan)}, r"expected floats in \[0, 1\]"),
        ({"x_train": np.full((60, 16, 16), 300)}, r"expected integers in 0..255"),
        ({"x_test": np.zeros((20, 8, 8), dtype=np.uint8)}, "differ in shape"),
        ({"x_train": np.full((60, 16, 16), None)}, "allow_pickle"),
    ],
)
def test_bad_archives_are_named(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    path = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(path))
    assert str(path) in str(error.value)


def test_files_that_are_no_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_dataset(str(tmp_path / "nowhere.npz"))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz"):
        load_dataset(str(tmp_path / "text.npz"))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(6, dtype=np.uint8) % 3,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(4, dtype=np.uint8) % 3,
    }


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("where", ["", "raw", "torchvision"])
def test_idx_files_are_found_and_left_alone(tmp_path: Path, name: str, zipped: bool, where: str) -> None:
    torchvision_folder = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}[name]
    folder = tmp_path / (torchvision_folder if where == "torchvision" else where)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = idx_files()
    for stem, array in arrays.items():
        content = idx(array)
        (folder / (stem + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    dataset = load_dataset(name, tmp_path)
    expected = arrays["train-images-idx3-ubyte"] / 127.5 - 1
    np.testing.assert_allclose(dataset.train_images[:, 0].numpy(), expected, atol=1e-6)
    assert dataset.test_labels.tolist() == [0, 1, 2, 0]
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 4


def test_the_systems_fashion_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stem, array in idx_files().items():
        (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
    reader = readers._idx_reader("fashion-mnist", "FashionMNIST", tmp_path)
    monkeypatch.setitem(DATASETS, "fashion-mnist", reader)
    assert load_dataset("fashion-mnist").image_shape == (1, 28, 28)
    assert load_dataset("fashion-mnist", Path("/nonexistent")).image_shape == (1, 28, 28)


def test_missing_idx_files_say_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte or .*MNIST/raw"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        load_dataset("mnist")


def test_usps_is_read_through_torchvision(tmp_path: Path) -> None:
    for name, count in (("usps.bz2", 5), ("usps.t.bz2", 3)):
        pixels = " ".join(f"{index + 1}:{-1 if index % 2 else 1}" for index in range(256))
        lines = [f"{label + 1} {pixels}\n" for label in range(count)]
        (tmp_path / name).write_bytes(bz2.compress("".join(lines).encode()))
    dataset = load_dataset("usps", tmp_path)
    assert dataset.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert dataset.train_images[0, 0, 0, :2].tolist() == [1, -1]


@pytest.mark.parametrize("name", ["cifar10", "usps"])
def test_missing_torchvision_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        load_dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        load_dataset(name)
    assert not list(tmp_path.iterdir())


def test_a_subset_is_drawn_at_random_in_order_and_by_seed() -> None:
    digits = load_dataset("digits")
    first, again, other = (digits.subset(100, 50, seed) for seed in (0, 0, 1))
    assert (len(first.train_labels), len(first.test_labels)) == (100, 50)
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)
    assert first.writers is not None
    assert first.writers.diff().ge(0).all()
    assert first.writers.max() > 10
    whole = digits.subset(None, 10**6, 0)
    assert torch.equal(whole.train_images, digits.train_images)
    assert torch.equal(whole.test_images, digits.test_images)


def test_a_named_data_set_may_lie_in_its_folder_as_an_archive(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "usps.npz")
    named, direct = load_dataset("usps", tmp_path), load_dataset(str(path))
    assert torch.equal(named.train_images, direct.train_images)
    assert torch.equal(named.test_labels, direct.test_labels)
    write_npz(path, y_test=None)
    with pytest.raises(ValueError, match=r"usps\.npz: missing arrays y_test"):
        load_dataset("usps", tmp_path)


def test_what_the_server_holds_no_client_has() -> None:
    dataset = load_dataset("digits")
    rest, images, labels = dataset.hold_out(100, seed=3)
    assert len(labels) == len(images) == 100
    assert len(rest.train_labels) == len(rest.train_images) == len(dataset.train_labels) - 100
    assert rest.writers is not None
    assert len(rest.writers) == len(rest.train_labels)
    everything = torch.cat([images, rest.train_images]).flatten(1).sort(0).values
    assert torch.equal(everything, dataset.train_images.flatten(1).sort(0).values)
    assert torch.equal(rest.test_images, dataset.test_images)
    again, other = dataset.hold_out(100, seed=3)[1], dataset.hold_out(100, seed=4)[1]
    assert torch.equal(again, images)
    assert not torch.equal(other, images)
    untouched, none, _ = dataset.hold_out(0, seed=3)
    assert torch.equal(untouched.train_images, dataset.train_images)
    assert len(none) == 0
    all_of_them = len(dataset.train_labels)
    with pytest.raises(ValueError, match=f"server_samples: {all_of_them} of {all_of_them} training images"):
        dataset.hold_out(all_of_them, seed=3)
