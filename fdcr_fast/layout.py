"""Order of the parameters in a flat vector: maps models and state dicts to ``[P]`` and back."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdcr_fast.memory import empty

_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def inner_module(model: Any) -> Any:
    """The module inside the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        if isinstance(model, _DATA_PARALLEL):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


@lru_cache(1 << 16)  # asked for every entry of every client, each round
def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put before it: ``module.`` of data parallelism, ``_orig_mod.`` of
    ``torch.compile``, and those of sharded and of checkpointed modules.
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def by_plain_name(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries under their plain names; under their own ones if two have the same plain name."""
    plain = {plain_name(name) if isinstance(name, str) else name: value for name, value in entries.items()}
    return plain if len(plain) == len(entries) else entries


def as_tensor(values: Any) -> Tensor:
    """A tensor without gradient on the memory of a tensor, an array, or any object with ``__dlpack__``.

    An array that torch cannot share is copied.

    Raises:
        TypeError: it is none of these, or of a dtype that torch has not.
    """
    if isinstance(values, Tensor):
        return values.detach() if values.requires_grad else values  # a call for each of thousands of entries
    if hasattr(values, "__dlpack__") and not isinstance(values, np.ndarray):
        return torch.utils.dlpack.from_dlpack(values)
    if not isinstance(values, np.ndarray):
        raise TypeError(f"expected a torch.Tensor or numpy.ndarray, got {type(values).__name__}")
    # torch shares neither foreign byte orders, nor negative strides, nor (without a warning) read-only
    # memory.
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    shareable = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    return torch.from_numpy(native if shareable else native.copy())


def _parameter(name: str, values: Any) -> Tensor:
    try:
        return as_tensor(values)
    except TypeError as error:
        raise TypeError(f"parameter {name}: {error}") from None


@dataclass(frozen=True)
class ParamLayout:
    """Names and shapes of ``P`` parameters in the order in which they lie in a flat vector.

    Attributes:
        names: Unique parameter names.
        shapes: Shape of each parameter.
        tied: Further names of these parameters, each with the name that stands for both; layouts that differ in nothing
            else are equal.

    Raises:
        ValueError: names and shapes differ in number, or a name comes twice.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tied: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        if len(self.names) != len(self.shapes):
            raise ValueError(f"{len(self.names)} names but {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be unique, got {list(self.names)}")

    @classmethod
    def from_module(cls, model: nn.Module) -> ParamLayout:
        """Layout in the order of ``model.named_parameters()``; shared parameters come once, buffers never.

        A model inside ``torch.compile``, ``nn.DataParallel`` or ``DistributedDataParallel`` is looked at itself, so
        that its names have no prefixes.

        Raises:
            TypeError: it is no module.
        """
        model = inner_module(model)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected a torch.nn.Module, got {type(model).__name__}: parameters by name make a layout with "
                "ParamLayout.from_tensors, which takes all of them (a state dict holds buffers, too)"
            )
        layout = cls.from_tensors(dict(model.named_parameters()))
        first = {parameter: name for name, parameter in model.named_parameters()}
        names = model.named_parameters(remove_duplicate=False)
        tied = tuple((name, first[parameter]) for name, parameter in names if name != first[parameter])
        return cls(layout.names, layout.shapes, tied)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ParamLayout:
        """Layout of named tensors in the mapping's order."""
        return cls(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each parameter's first element in the flat vector."""
        return tuple(itertools.accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Range of each parameter in the flat vector, by name."""
        return {
            name: slice(start, start + size)
            for name, start, size in zip(self.names, self.offsets, self.sizes, strict=True)
        }

    @property
    def numel(self) -> int:
        """``P``, the length of the flat vector."""
        return sum(self.sizes)

    def flatten(
        self,
        source: nn.Module | Mapping[str, Tensor | NDArray[Any]] | Sequence[Tensor | NDArray[Any]],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Copy the parameters into one new vector ``[P]``, detached.

        Args:
            source: See :meth:`tensors`.
            dtype: Of the result; by default the common type of the parameters.
        """
        tensors = self.tensors(source)
        if not tensors:
            return torch.empty(0, dtype=dtype)
        dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        vector = empty([self.numel], dtype, tensors[0].device)
        return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors], out=vector)

    def tensors(
        self, source: nn.Module | Mapping[str, Tensor | NDArray[Any]] | Sequence[Tensor | NDArray[Any]]
    ) -> list[Tensor]:
        """The parameters of a source in the layout's order, detached, not copied.

        Args:
            source: A module, a mapping by name such as a ``state_dict`` (entries that are not in the layout,
                such as buffers, are ignored, and so are the prefixes of wrappers, see :func:`plain_name`), or a
                sequence in the layout's order.

        Raises:
            ValueError: parameters are missing, too many, or of another shape; the message names them.
            TypeError: an entry is neither tensor nor array; the message names it.
        """
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters(remove_duplicate=False))
        if isinstance(source, Mapping):
            names: Iterable[str] = self.names
            if any(name not in source for name in names):
                source, names = by_plain_name(source), by_plain_name(dict.fromkeys(self.names))
                missing = [name for name in names if name not in source]
                if missing:
                    raise ValueError(f"missing parameters: {', '.join(missing)}")
            entries: Iterable[Tensor | NDArray[Any]] = [source[name] for name in names]
        elif len(source) != len(self.names):
            raise ValueError(f"expected {len(self.names)} parameters, got {len(source)}")
        else:
            entries = source
        tensors = [_parameter(name, entry) for name, entry in zip(self.names, entries, strict=True)]
        wrong = [
            f"{name} {tuple(tensor.shape)}, expected {shape}"
            for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True)
            if tensor.shape != shape
        ]
        if wrong:
            raise ValueError(f"parameters of the wrong shape: {'; '.join(wrong)}")
        return tensors

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``[P]`` by name, each in its parameter's shape.

        Raises:
            ValueError: the vector is not of shape ``[P]``.
        """
        if tuple(vector.shape) != (self.numel,):
            raise ValueError(f"expected a vector of {self.numel} elements, got shape {tuple(vector.shape)}")
        return {
            name: vector[self.slices[name]].view(shape) for name, shape in zip(self.names, self.shapes, strict=True)
        }
