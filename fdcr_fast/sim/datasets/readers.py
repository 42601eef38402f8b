"""Where data sets come from: files that are already there, and scikit-learn."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.sim.datasets.dataset import Dataset, dataset_of

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NUM_DIGITS_WRITERS = 14


def _digits(_data_dir: Path | None) -> Dataset:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels; every fifth image of a class is a test image.

    The images follow the 14 handwriting forms they were collected from, without saying where one ends.
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
    return dataset_of(images[~test], labels[~test], images[test], labels[test], writers[~test])


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

        return dataset_of(
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
        return dataset_of(train.data, train.targets, test.data, test.targets)

    return read


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _idx_reader("fashion-mnist", "FashionMNIST", DEBIAN_FASHION_MNIST),
    "mnist": _idx_reader("mnist", "MNIST"),
    "cifar10": _torchvision_reader("cifar10", "CIFAR10", "cifar-10-batches-py/"),
    "cifar100": _torchvision_reader("cifar100", "CIFAR100", "cifar-100-python/"),
    "usps": _torchvision_reader("usps", "USPS", "usps.bz2 and usps.t.bz2"),
}


def _npz(path: Path) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"missing arrays {', '.join(missing)}; it holds {', '.join(arrays) or 'none'}")
        return dataset_of(*(arrays[name] for name in names))


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
