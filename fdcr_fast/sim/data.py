"""Data sets: images as float32 ``[N, C, H, W]`` in [-1, 1] and int64 labels, held in memory."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast.sim.seeding import torch_generator

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NUM_DIGITS_WRITERS = 14


@dataclass(frozen=True)
class Dataset:
    """Training and test images.

    Attributes:
        train_images: Float32 ``[N, C, H, W]`` in [-1, 1].
        train_labels: Int64 ``[N]`` in ``[0, num_classes)``.
        test_images: Like ``train_images``.
        test_labels: Like ``train_labels``.
        num_classes: One more than the largest label.
        writers: Int64 ``[N]``, who wrote each training image, where that is known.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    writers: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def without_pixels(self) -> Dataset:
        """Images on the device ``meta``: of the same number and shape, but nothing to compute with."""
        return replace(self, train_images=self.train_images.to("meta"), test_images=self.test_images.to("meta"))

    def subset(self, max_train: int | None, max_test: int | None, seed: int) -> Dataset:
        """At most so many images, drawn at random without replacement and kept in their order."""

        def draw(available: int, wanted: int | None, purpose: str) -> Tensor | slice:
            if wanted is None or wanted >= available:
                return slice(None)
            order = torch.randperm(available, generator=torch_generator(seed, purpose))
            return order[:wanted].sort().values

        train = draw(len(self.train_labels), max_train, "train subset")
        test = draw(len(self.test_labels), max_test, "test subset")
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            writers=None if self.writers is None else self.writers[train],
        )

    def hold_out(self, count: int, seed: int) -> tuple[Dataset, Tensor, Tensor]:
        """Without ``count`` training images drawn at random, and those with their labels.

        Raises:
            ValueError: no training image would be left.
        """
        available = len(self.train_labels)
        if count >= available:
            raise ValueError(f"server_samples: {count} of {available} training images would leave none to the clients")
        order = torch.randperm(available, generator=torch_generator(seed, "server samples"))
        kept = order[count:].sort().values
        rest = replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            writers=None if self.writers is None else self.writers[kept],
        )
        return rest, self.train_images[order[:count]], self.train_labels[order[:count]]


def as_images(values: NDArray[Any] | Tensor, name: str) -> Tensor:
    """Any image array as float32 ``[N, C, H, W]`` in [-1, 1].

    Integers are taken to span 0..255; floats to span -1..1 where some value is negative, else 0..1.
    """
    array = np.asarray(values)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"{name}: expected images of shape [N, H, W] or [N, H, W, C], got {array.shape}")
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name}: expected integer or float images, got dtype {array.dtype}")
    low, high = float(array.min()), float(array.max())
    integer = array.dtype.kind in "ui"
    if not (0 <= low <= high <= 255 if integer else -1 <= low <= high <= 1):
        allowed = "integers in 0..255" if integer else "floats in [0, 1] or [-1, 1]"
        raise ValueError(f"{name}: expected {allowed}, got values from {low:g} to {high:g}")
    images = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2), dtype=np.float32))
    if integer:
        return images.div_(127.5).sub_(1)
    return images if low < 0 else images.mul_(2).sub_(1)


def _labels(values: NDArray[Any] | Tensor | Sequence[int], name: str, count: int) -> Tensor:
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "ui":
        raise ValueError(f"{name}: expected {count} integer labels, got shape {array.shape}, {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"{name}: labels must not be negative, got {array.min()}")
    return torch.from_numpy(array.astype(np.int64))


def _dataset(x_train: Any, y_train: Any, x_test: Any, y_test: Any, writers: Tensor | None = None) -> Dataset:
    train, test = as_images(x_train, "x_train"), as_images(x_test, "x_test")
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"training and test images differ in shape: {tuple(train.shape[1:])}, {tuple(test.shape[1:])}")
    train_labels = _labels(y_train, "y_train", len(train))
    test_labels = _labels(y_test, "y_test", len(test))
    num_classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= num_classes:
        raise ValueError(f"y_test has label {int(test_labels.max())}, y_train only up to {num_classes - 1}")
    return Dataset(train, train_labels, test, test_labels, num_classes, writers)


def _digits(_data_dir: Path | None) -> Dataset:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels; every fifth image of a class is a test image.

    The rows follow the 14 handwriting forms they were collected from, without saying where one ends.
    ``writers`` is therefore a proxy: 14 consecutive chunks of equal size.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target)
    # Rank of every image within its class: the split needs no seed and keeps the order.
    rank = (torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None]) - 1).squeeze(1)
    test = rank % 5 == 4
    writers = torch.arange(len(labels)) * NUM_DIGITS_WRITERS // len(labels)
    images = (digits.images / 16.0).astype(np.float32)
    return _dataset(images[~test], labels[~test], images[test], labels[test], writers[~test])


def _read_idx(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    if path.suffix != ".gz":
        return torch.as_tensor(read_sn3_pascalvincent_tensor(str(path)))
    # torchvision reads by path only, and must not unpack beside the original.
    with tempfile.NamedTemporaryFile() as unpacked:
        unpacked.write(gzip.decompress(path.read_bytes()))
        unpacked.flush()
        return torch.as_tensor(read_sn3_pascalvincent_tensor(unpacked.name))


def _idx_reader(name: str, folder: str, *system_folders: Path) -> Callable[[Path | None], Dataset]:
    """Reader of four IDX files, plain or gzipped, in DIR, DIR/raw or torchvision's DIR/<folder>/raw."""

    def read(data_dir: Path | None) -> Dataset:
        own = [] if data_dir is None else [data_dir, data_dir / "raw", data_dir / folder / "raw"]
        places = [*own, *system_folders]

        def find(stem: str) -> Tensor:
            for path in (place / f"{stem}{suffix}" for place in places for suffix in ("", ".gz")):
                if path.is_file():
                    return _read_idx(path)
            looked = ", ".join(map(str, places)) or "no folder (give --data-dir)"
            raise FileNotFoundError(f"{name}: no file {stem} or {stem}.gz in {looked}; nothing is downloaded")

        return _dataset(
            find("train-images-idx3-ubyte"),
            find("train-labels-idx1-ubyte"),
            find("t10k-images-idx3-ubyte"),
            find("t10k-labels-idx1-ubyte"),
        )

    return read


def _torchvision_reader(name: str, class_name: str, files: str) -> Callable[[Path | None], Dataset]:
    def read(data_dir: Path | None) -> Dataset:
        from torchvision import datasets

        if data_dir is None:
            raise FileNotFoundError(f"{name}: give --data-dir, a folder that holds {files}; nothing is downloaded")
        try:
            train, test = (
                getattr(datasets, class_name)(data_dir, train=train, download=False) for train in (True, False)
            )
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{name}: expected {files} in {data_dir}; nothing is downloaded ({error})"
            ) from error
        return _dataset(train.data, train.targets, test.data, test.targets)

    return read


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _idx_reader("fashion-mnist", "FashionMNIST", DEBIAN_FASHION_MNIST),
    "mnist": _idx_reader("mnist", "MNIST"),
    "cifar10": _torchvision_reader("cifar10", "CIFAR10", "cifar-10-batches-py/"),
    "usps": _torchvision_reader("usps", "USPS", "usps.bz2 and usps.t.bz2"),
}


def _npz(path: Path) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"missing arrays {', '.join(missing)}; it holds {', '.join(arrays) or 'none'}")
        return _dataset(*(arrays[name] for name in names))


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set of ``DATASETS`` or a file ``*.npz`` with arrays ``x_train y_train x_test y_test``.

    A data set of ``DATASETS`` may also lie in ``data_dir`` as such a file, ``NAME.npz``, which is then preferred.
    Nothing is ever downloaded. Archives are read without pickle.

    Raises:
        FileNotFoundError: saying which files were looked for, and where.
        ValueError: the file's arrays are not images and labels.
    """
    if name in DATASETS:
        path = None if data_dir is None else data_dir / f"{name}.npz"
        if path is None or not path.is_file():
            return DATASETS[name](data_dir)
    else:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no data file {path}")
    try:
        return _npz(path)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
