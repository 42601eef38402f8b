"""The forms in which data may come, and batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from fdcr_fast.layout import as_tensor

_SHARED = (type(None), Number, str, Enum, torch.dtype, torch.device)


class _Rows:
    """A list of text or numbers, an entry per sample, that can be cut like a tensor."""

    def __init__(self, entries: list[Any] | tuple[Any, ...]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, samples: slice) -> _Rows:
        return _Rows(self.entries[samples])


class Batch:
    """Inputs and targets of some samples.

    Tensors have the samples in dimension 0, and so have lists of text and numbers that are as long. Tensors without
    dimensions, flags, None and the like go with every sample.
    """

    def __init__(self, leaves: Sequence[Any], structure: TreeSpec, samples: int) -> None:
        self._leaves = leaves
        self._structure = structure
        self.samples = samples

    @classmethod
    def of(cls, inputs: Any, targets: Any) -> Batch:
        """A batch of any nested tuples, lists and mappings of tensors and arrays.

        Raises:
            ValueError: Inputs and targets have not the same number of samples, or hold something else.
        """
        inputs, targets = _as_tensors(inputs, "inputs"), _as_tensors(_as_list_of_numbers(targets), "targets")
        rows = [[len(x) for x in tree_flatten(tree)[0] if _has_samples(x)] for tree in (inputs, targets)]
        if not rows[1]:
            raise ValueError("expected targets with the samples in dimension 0, got none: a batch, not a single sample")
        if len({*rows[0], *rows[1]}) > 1:
            raise ValueError(
                f"all tensors must have the samples in dimension 0, got {rows[0]} inputs, {rows[1]} targets"
            )
        n = rows[1][0]
        leaves, structure = tree_flatten((inputs, targets), is_leaf=_may_be_rows)
        return cls([_Rows(x) if _may_be_rows(x) and len(x) == n else x for x in leaves], structure, n)

    def with_targets(self, targets: Any) -> Batch:
        """These inputs with other targets; what a list among the inputs holds was seen when the data came."""
        inputs, own = tree_unflatten(self._leaves, self._structure)
        own_rows = any(isinstance(x, _Rows) for x in tree_flatten(own)[0])
        targets = _as_tensors(_as_list_of_numbers(targets), "targets")
        leaves, structure = tree_flatten((inputs, targets), is_leaf=_may_be_rows)
        if own_rows:
            count = len(tree_flatten(inputs, is_leaf=_may_be_rows)[0])
            leaves[count:] = [_Rows(x) if _may_be_rows(x) and len(x) == self.samples else x for x in leaves[count:]]
        return Batch(leaves, structure, self.samples)

    def with_repeated(self, sample: int, instead: int) -> Batch:
        """A copy of this batch with one sample in the place of another one, too."""
        chosen = list(range(self.samples))
        chosen[instead] = sample
        leaves = [
            x.index_select(0, torch.tensor(chosen, device=x.device))
            if _has_samples(x)
            else _Rows([x.entries[i] for i in chosen])
            if isinstance(x, _Rows)
            else x
            for x in self._leaves
        ]
        return Batch(leaves, self._structure, self.samples)

    def part(self, samples: slice) -> Batch:
        """A batch of some of the samples, which are not copied."""
        if samples.start == 0 and samples.stop >= self.samples:
            return self
        leaves = [x[samples] if _has_samples(x) or isinstance(x, _Rows) else x for x in self._leaves]
        return Batch(leaves, self._structure, len(range(self.samples)[samples]))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, which have the samples in dimension 0."""
        return [x for x in self._leaves if _has_samples(x)]

    @property
    def shared(self) -> list[Any]:
        """Whatever goes with all samples."""
        return [x for x in self._leaves if not _has_samples(x) and not isinstance(x, _Rows)]

    @property
    def has_lists(self) -> bool:
        """Whether something else than tensors differs from sample to sample."""
        return any(isinstance(x, _Rows) for x in self._leaves)

    def with_tensors(self, tensors: Iterable[Tensor]) -> Batch:
        """This batch with other tensors, which have the samples in dimension 0."""
        given = iter(tensors)
        leaves = [next(given) if _has_samples(x) else x for x in self._leaves]
        return Batch(leaves, self._structure, next(len(x) for x in leaves if _has_samples(x)))

    def tree(self) -> tuple[Any, Any]:
        """The inputs and the targets, as they were given."""
        leaves = [x.entries if isinstance(x, _Rows) else x for x in self._leaves]
        inputs, targets = tree_unflatten(leaves, self._structure)
        return inputs, targets

    def to(self, device: torch.device) -> Batch:
        """This batch on a device."""
        leaves = [x.to(device) if isinstance(x, Tensor) else x for x in self._leaves]
        return Batch(leaves, self._structure, self.samples)

    def private(self, *, channels_last: bool = False) -> Batch:
        """A copy that a model may write to; images may have their channels last in memory."""
        leaves = [_copied(x, channels_last) for x in self._leaves]
        return Batch(leaves, self._structure, self.samples)


def _copied(x: Any, channels_last: bool) -> Any:
    if isinstance(x, _Rows):
        return _Rows(x.entries[:])
    if not isinstance(x, Tensor):
        return x[:] if isinstance(x, list) else x
    copy = x.detach()
    if channels_last and x.dim() == 4 and x.is_floating_point():
        copy = copy.contiguous(memory_format=torch.channels_last)
    if copy.data_ptr() == x.data_ptr():
        copy = copy.clone()
    return copy.requires_grad_(x.requires_grad)  # for models that differentiate by their inputs


def _has_samples(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _may_be_rows(x: Any) -> bool:
    """Whether an argument may hold an entry per sample; tuples of numbers are sizes and the like."""
    return (isinstance(x, list) and bool(x) and all(isinstance(entry, str | Number) for entry in x)) or (
        type(x) is tuple and bool(x) and all(isinstance(entry, str) for entry in x)
    )


def _as_tensors(tree: Any, what: str) -> Any:
    if isinstance(tree, Tensor):
        if tree.layout != torch.strided or tree.is_nested:
            kind = "nested" if tree.is_nested else f"sparse ({tree.layout})"
            raise ValueError(f"expected dense {what}, whose samples can be taken apart, got a {kind} tensor")
        return tree
    if isinstance(tree, _SHARED) and not isinstance(tree, np.generic):
        return tree
    if isinstance(tree, np.ndarray | np.generic):
        return as_tensor(np.asarray(tree))
    if isinstance(tree, Mapping):
        return {key: _as_tensors(x, what) for key, x in tree.items()}
    if isinstance(tree, tuple | list):
        entries = [_as_tensors(x, what) for x in tree]
        return type(tree)(*entries) if hasattr(tree, "_fields") else type(tree)(entries)
    raise ValueError(f"expected {what} of tensors, arrays, tuples, lists and mappings, got {type(tree).__name__}")


def _as_list_of_numbers(targets: Any) -> Any:
    numbers = isinstance(targets, list | tuple) and targets and all(isinstance(x, Number) for x in targets)
    return torch.tensor(targets) if numbers else targets


def batches(data: Any, batch_size: int, most: int | None = None) -> Iterator[Batch]:
    """The data, or the first ``most`` batches as they come, in batches of at most ``batch_size`` samples each."""
    if isinstance(data, Dataset) or hasattr(data, "set_format"):  # Hugging Face data sets are none of PyTorch's
        data = DataLoader(data, batch_size, generator=torch.Generator())  # else it draws from the global one
    for inputs, targets in map(_pair, islice([data] if _is_one_batch(data) else _iterated(data), most)):
        batch = Batch.of(inputs, targets)
        for start in range(0, batch.samples, batch_size):
            yield batch.part(slice(start, start + batch_size))


def _is_one_batch(data: Any) -> bool:
    if isinstance(data, tuple | list) and len(data) == 2:
        arrays = Tensor | np.ndarray  # which are no batches of their own
        return isinstance(data[0], arrays) or isinstance(_as_list_of_numbers(data[1]), arrays)
    return isinstance(data, Mapping)


def _iterated(data: Any) -> Iterable[Any]:
    if isinstance(data, Tensor | np.ndarray) or not isinstance(data, Iterable):
        raise ValueError(f"expected (inputs, targets), or an iterable of such batches, got {type(data).__name__}")
    return data


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: x for name, x in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise ValueError(
        f"expected batches (inputs, targets), or mappings with labels, got {got}; "
        "several inputs are a tuple: ((first, second), targets)"
    )
