"""A user's own data: tensors, data sets of PyTorch or of Hugging Face, whole or client by client."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.sim.datasets.dataset import Dataset, as_images, as_labels


@dataclass(frozen=True, eq=False, kw_only=True)
class FederatedData:
    """Training and test sets for :func:`fdcr_fast.sim.simulate`. All samples are read once, and held in memory.

    A *set* is ``(inputs, labels)`` of tensors or arrays; or anything with ``len()`` and indices whose samples are pairs
    ``(input, label)``, such as a ``torch.utils.data.Dataset``, or mappings, such as a data set of Hugging Face's
    ``datasets``. Inputs ``[N, ...]`` of one shape become float32 or, of integers such as the ids of tokens, int64;
    images as PIL or as uint8 arrays ``[H, W]`` or ``[H, W, C]`` become ``[C, H, W]`` in [-1, 1], and tensors are taken
    as they are. Labels are classes, integers from 0 on. What a data set draws at random, such as a crop, is drawn once.

    Args:
        train: One set, or a list of sets, one for each client.
        test: A set for the accuracy of the global model.
        clients: Of one training set, the indices of the samples of each client, in a list. Without, and where ``train``
            is no list, the configuration's ``split`` deals the samples to the clients.
        attack_test: A set for the attack success rate: the share of its inputs that are taken for its labels. By
            default it is the attack that says which inputs those are.
        columns: Names of input and label in samples that are mappings.

    Raises:
        TypeError: something is no set.
        ValueError: shapes or numbers do not fit; the message names the set.
    """

    train: Any
    test: Any
    clients: Sequence[Any] | None = None
    attack_test: Any = None
    columns: tuple[str, str] | None = None

    @cached_property
    def num_clients(self) -> int | None:
        """How many clients the data are of; None where they say nothing of clients."""
        if isinstance(self.train, list):
            return len(self.train)
        return None if self.clients is None else len(self.clients)

    @cached_property
    def dataset(self) -> Dataset:
        """All samples, and whose they are."""
        inputs, labels, owners = self._training()
        test_inputs, test_labels = self._read(self.test, "test")
        attack_inputs, attack_labels = None, None
        if self.attack_test is not None:
            attack_inputs, attack_labels = self._read(self.attack_test, "attack_test")
        for name, others in (("test", test_inputs), ("attack_test", attack_inputs)):
            if others is not None and (others.shape[1:], others.dtype) != (inputs.shape[1:], inputs.dtype):
                raise ValueError(f"{name}: inputs are {_shape(others)}, those of train {_shape(inputs)}")
        every_label = [labels, test_labels, *([] if attack_labels is None else [attack_labels])]
        return Dataset(
            inputs,
            labels,
            test_inputs,
            test_labels,
            1 + max(int(some.max()) for some in every_label),
            owners=owners,
            attack_images=attack_inputs,
            attack_labels=attack_labels,
        )

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all samples and of whose they are."""
        digest = hashlib.blake2b(digest_size=6)
        for values in vars(self.dataset).values():
            if isinstance(values, Tensor):
                digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
                digest.update(values.contiguous().numpy().data)
        return digest.hexdigest()

    def _read(self, source: Any, name: str) -> tuple[Tensor, Tensor]:
        try:
            return read_set(source, self.columns)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _training(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if isinstance(self.train, Mapping):
            raise TypeError("train: expected a list of the clients' sets, in their order, got a mapping")
        if not isinstance(self.train, list):
            inputs, labels = self._read(self.train, "train")
            if self.clients is None:
                return inputs, labels, None
            rows = [torch.as_tensor(own, dtype=torch.int64).flatten() for own in self.clients]
            for client, own in enumerate(rows):
                if own.numel() and not (int(own.min()) >= 0 and int(own.max()) < len(labels)):
                    raise ValueError(f"clients: client {client} has indices outside of 0..{len(labels) - 1}")
            every = torch.cat(rows)
            return inputs[every], labels[every], _owners(list(map(len, rows)))
        if self.clients is not None:
            raise ValueError("clients: train is a list of sets, one for each client, and says already who has what")
        sets = [self._read(own, f"train, client {client}") for client, own in enumerate(self.train)]
        if not sets:
            raise ValueError("train: expected the set of at least one client, got an empty list")
        for client, (own, _) in enumerate(sets):
            first = sets[0][0]
            if (own.shape[1:], own.dtype) != (first.shape[1:], first.dtype):
                raise ValueError(
                    f"train: inputs of client {client} are {_shape(own)}, those of client 0 {_shape(first)}"
                )
        return (
            torch.cat([own for own, _ in sets]),
            torch.cat([own for _, own in sets]),
            _owners([len(own) for _, own in sets]),
        )


def read_set(source: Any, columns: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, ...]`` and labels int64 ``[N]`` of a set; see :class:`FederatedData`.

    Raises:
        TypeError: it is no set.
        ValueError: inputs differ in shape, labels are no classes, or columns are missing.
    """
    if isinstance(source, torch.utils.data.TensorDataset):
        source = source.tensors
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(x, Tensor | np.ndarray) for x in source):
        inputs = _inputs(source[0])
        return inputs, as_labels(source[1], "labels", len(inputs))
    if isinstance(source, tuple) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"expected (inputs, labels) of tensors, or a data set with len() and indices, got {type(source).__name__}"
        )
    if not len(source):
        raise ValueError("expected samples, got an empty data set")
    pairs = [_pair(source[index], columns) for index in range(len(source))]
    inputs = _stacked([value for value, _ in pairs])
    return inputs, as_labels(np.array([int(label) for _, label in pairs]), "labels", len(inputs))


def _pair(sample: Any, columns: tuple[str, str] | None) -> tuple[Any, Any]:
    if isinstance(sample, Mapping):
        if columns is None or any(name not in sample for name in columns):
            raise ValueError(
                f"samples have the columns {', '.join(map(repr, sample))}: say which are input and label by columns="
            )
        return sample[columns[0]], sample[columns[1]]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ValueError(f"expected samples that are pairs (input, label) or mappings, got {type(sample).__name__}")
    return sample[0], sample[1]


def _stacked(values: list[Any]) -> Tensor:
    first = values[0]
    arrays = [value if isinstance(value, Tensor) else np.asarray(value) for value in values]
    shapes = {tuple(array.shape): index for index, array in reversed(list(enumerate(arrays)))}
    if len(shapes) > 1:
        (one, i), (other, j) = list(shapes.items())[:2]
        raise ValueError(f"inputs differ in shape: sample {i} has {one}, sample {j} has {other}")
    return _inputs(torch.stack(arrays) if isinstance(first, Tensor) else np.stack(arrays))  # type: ignore[arg-type]


def _inputs(values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        if values.dtype == np.uint8 and values.ndim in (3, 4):
            return as_images(values, "inputs")
        if values.dtype.kind not in "uifb":
            raise ValueError(f"expected inputs of numbers, got dtype {values.dtype}; texts are ids of tokens")
        values = torch.from_numpy(np.ascontiguousarray(values))
    if values.dim() < 1 or 0 in values.shape:
        raise ValueError(f"expected inputs [N, ...], got shape {list(values.shape)}")
    if values.is_complex():
        raise ValueError(f"expected inputs of real numbers, got {values.dtype}")
    floating = values.is_floating_point() or values.dtype == torch.bool
    inputs: Tensor = values.detach().cpu().to(torch.float32 if floating else torch.int64)
    return inputs


def _owners(sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def _shape(inputs: Tensor) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape[1:])}"
