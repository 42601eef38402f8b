"""A data set: inputs, of images float32 ``[N, C, H, W]`` in [-1, 1], and int64 labels, held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast.sim.seeding import torch_generator


@dataclass(frozen=True)
class Dataset:
    """Training and test images, or whatever a user's own data are of.

    Attributes:
        train_images: Float32 ``[N, C, H, W]`` in [-1, 1]; of a user's data float32 or int64 ``[N, ...]``.
        train_labels: Int64 ``[N]`` in ``[0, num_classes)``.
        test_images: Like ``train_images``.
        test_labels: Like ``train_labels``.
        num_classes: One more than the largest label.
        writers: Int64 ``[N]``, who wrote each training image, where that is known.
        owners: Int64 ``[N]``, the client that has each training image, where the data say so.
        attack_images: Like ``train_images``, what the success of an attack is measured on; None where it is the attack
            that says so.
        attack_labels: What an attack wants these taken for, int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    writers: Tensor | None = None
    owners: Tensor | None = None
    attack_images: Tensor | None = None
    attack_labels: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(C, H, W)``, or the shape of whatever an input is."""
        return tuple(self.train_images.shape[1:])

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
            owners=None if self.owners is None else self.owners[train],
        )

    def hold_out(self, count: int, seed: int) -> tuple[Dataset, Tensor, Tensor]:
        """The data set without ``count`` training images drawn at random, and those with their labels.

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
            owners=None if self.owners is None else self.owners[kept],
        )
        return rest, self.train_images[order[:count]], self.train_labels[order[:count]]


def stored(inputs: Tensor) -> Tensor:
    """The inputs as models want them: images channels last, as convolutions and pooling are faster so on CPU."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs.contiguous()


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


def as_labels(values: NDArray[Any] | Tensor | Sequence[int], name: str, count: int) -> Tensor:
    """Labels as int64 ``[count]``.

    Raises:
        ValueError: they are no integers from 0 on, or not so many.
    """
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "ui":
        raise ValueError(f"{name}: expected {count} integer labels, got shape {array.shape}, {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"{name}: labels must not be negative, got {array.min()}")
    return torch.from_numpy(array.astype(np.int64))


def dataset_of(x_train: Any, y_train: Any, x_test: Any, y_test: Any, writers: Tensor | None = None) -> Dataset:
    """The data set of arrays of images and labels.

    Raises:
        ValueError: they are no images or labels, or do not fit together.
    """
    train, test = as_images(x_train, "x_train"), as_images(x_test, "x_test")
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"training and test images differ in shape: {tuple(train.shape[1:])}, {tuple(test.shape[1:])}")
    train_labels = as_labels(y_train, "y_train", len(train))
    test_labels = as_labels(y_test, "y_test", len(test))
    num_classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= num_classes:
        raise ValueError(f"y_test has label {int(test_labels.max())}, y_train only up to {num_classes - 1}")
    return Dataset(train, train_labels, test, test_labels, num_classes, writers)
