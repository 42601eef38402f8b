"""Images in folders, and writers' images as LEAF has them, from files that are already there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as Samples

from fdcr_fast.sim.datasets.federated import FederatedData

FEMNIST_PIXELS = 28


def image_folder(data_dir: Path | None, size: int | None = None, test: str = "test") -> FederatedData:
    """Images ``train/CLASS/*`` and ``test/CLASS/*``, as ``torchvision.datasets.ImageFolder`` reads them.

    Args:
        data_dir: The folder that has both.
        size: Pixels to which images are scaled, height and width alike; None where all are of one size.
        test: Name of the folder with the test images, such as ``val``.

    Raises:
        FileNotFoundError: there are no such folders or images.
        ValueError: images differ in size, or the folders in classes.
    """
    train, others = (_images_in(_folder("image-folder", data_dir) / part, size) for part in ("train", test))
    if train.classes != others.classes:
        raise ValueError(f"image-folder: train has the classes {train.classes}, {test} has {others.classes}")
    return FederatedData(train=train, test=others)


def tiny_imagenet(data_dir: Path | None, size: int | None = None) -> FederatedData:
    """Tiny ImageNet as it comes: ``train/CLASS/images/*.JPEG``, and ``val/images`` with ``val_annotations.txt``.

    Args:
        data_dir: The folder ``tiny-imagenet-200``.
        size: Pixels to which images of 64x64 are scaled; None for none.

    Raises:
        FileNotFoundError: there are no such files.
    """
    folder = _folder("tiny-imagenet", data_dir)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(f"tiny-imagenet: no file {annotations}; nothing is downloaded")
    train = _images_in(folder / "train", size)
    names = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    files = [(folder / "val" / "images" / name, train.class_to_idx[label]) for name, label in names]
    return FederatedData(train=train, test=_Files(files, train))


def femnist(data_dir: Path | None, clients: int) -> FederatedData:
    """FEMNIST as LEAF writes it: ``train/*.json`` and ``test/*.json``, whose users, those with most images first, are
    clients (Caldas et al. 2018, arXiv:1812.01097). The test set is that of these users.

    Args:
        data_dir: LEAF's ``data/femnist/data``, or any folder of that form.
        clients: Number of clients.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: they have fewer users.
    """
    folder = _folder("femnist", data_dir)
    train = dict(_users(folder / "train"))
    chosen = sorted(train, key=lambda user: (-len(train[user][1]), user))[:clients]
    if len(chosen) < clients:
        raise ValueError(f"femnist: {folder} has {len(chosen)} users, too few for {clients} clients")
    test = [images for user, images in _users(folder / "test") if user in set(chosen)]
    if not test:
        raise ValueError(
            f"femnist: {folder / 'test'} has no images of the {clients} users with most of {folder / 'train'}"
        )
    inputs, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    return FederatedData(train=[train[user] for user in chosen], test=(inputs, labels))


def _folder(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise FileNotFoundError(f"{name}: give --data-dir, the folder of its files; nothing is downloaded")
    return data_dir


def _images_in(folder: Path, size: int | None) -> Any:
    """A data set of torchvision's, of images in RGB."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Resize

    return ImageFolder(str(folder), transform=None if size is None else Resize((size, size)))


class _Files(Samples[Any]):
    """Images of files with labels, read as another data set reads its own."""

    def __init__(self, files: list[tuple[Path, int]], like: Any) -> None:
        self._files = files
        self._like = like

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self._files[index]
        image = self._like.loader(str(path))
        return (image if self._like.transform is None else self._like.transform(image)), label


def _users(folder: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Images in [-1, 1] and labels of every user of a folder of LEAF's, whose pixels are in [0, 1], 1 being white."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"femnist: no files *.json in {folder}; nothing is downloaded")
    for path in paths:
        content = json.loads(path.read_text())
        for user in content["users"]:
            samples = content["user_data"][user]
            pixels = np.asarray(samples["x"], dtype=np.float32).reshape(-1, 1, FEMNIST_PIXELS, FEMNIST_PIXELS)
            yield user, (torch.from_numpy(2 * pixels - 1), torch.tensor(samples["y"]))
