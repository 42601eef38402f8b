"""A model called with other values than its own, and left as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from operator import is_
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from fdcr_fast.importance import workarounds
from fdcr_fast.importance.model import Names

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # registries of parameters, buffers, modules and hooks


class Stateless:
    """Context manager: the model as a function of its parameters.

    Every forward pass finds the model with the buffers that are given here, and with the attributes that its modules
    had when the context was entered. What a pass writes to either, it writes for itself: running statistics, counters,
    tensors stored on modules, entries of their lists and dictionaries. What such objects hold deeper inside is not
    looked at.

    Args:
        model: The model, in the modes in which it is to be called.
        values: Its parameters and buffers by their first names, or others of these shapes.

    Attributes:
        module: The model itself.
        params: The parameters among ``values``.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.module = model
        first = Names(model).first
        self._slots = [
            (registry, leaf, first[f"{prefix}.{leaf}" if prefix else leaf])
            for prefix, module in model.named_modules()
            for registry in (module._parameters, module._buffers)
            for leaf, x in registry.items()
            if x is not None
        ]
        parameters = {name for name, _ in model.named_parameters()}
        # Embeddings with max_norm shorten rows in place whenever they look them up.
        shortened = [
            first[f"{prefix}.weight" if prefix else "weight"]
            for prefix, module in model.named_modules()
            if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag)
        ]
        places = [name for _, _, name in self._slots]
        self._tied_and_shortened = any(places.count(name) > 1 for name in shortened)
        self.params = {
            # Tensors from inference mode can be neither changed nor differentiated by.
            name: x.detach().clone() if name in shortened or x.is_inference() else x.detach()
            for name, x in values.items()
            if name in parameters
        }
        self._read_only = [(name, x, x._version) for name, x in self.params.items() if name not in shortened]
        self._buffers = {name: _Private(x) for name, x in values.items() if name not in parameters}
        self._attributes: list[_Contents] = []
        self._internals: list[_Contents] = []

    def __enter__(self) -> Stateless:
        known = {id(x) for registry, leaf, _ in self._slots for x in [registry[leaf]]}
        for module in self.module.modules():
            attributes = vars(module)
            self._attributes.append(_Contents(attributes, known))
            for name, x in attributes.items():
                if isinstance(x, dict | list | set | deque):
                    (self._internals if name in _OF_EVERY_MODULE else self._attributes).append(_Contents(x, known))
        workarounds.lay_out_gradients_of_batch_norms(self.module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for contents in (*self._attributes, *self._internals):
            contents.restore()

    @contextmanager
    def at(self, params: Mapping[str, Tensor]) -> Iterator[Callable[[Any], Any]]:
        """The model at ``params`` instead of some of its parameters: a function of its inputs.

        It stays so until the end of the context, for whatever a backward pass computes again.
        """
        wrapped = any(map(is_functorch_wrapped_tensor, params.values()))
        values = {**self.params, **{name: x.fresh() for name, x in self._buffers.items()}, **params}
        own = [registry[leaf] for registry, leaf, _ in self._slots]
        for registry, leaf, name in self._slots:
            registry[leaf] = values[name]
        if wrapped:
            for module in self.module.modules():
                vars(module)["_apply"] = workarounds.refuse_conversion
        try:
            yield self._call
        finally:
            for (registry, leaf, _), x in zip(self._slots, own, strict=True):
                registry[leaf] = x
            for contents in self._attributes:
                contents.restore()
        for name, x, version in self._read_only:
            if x._version != version:
                raise ValueError(f"the forward pass changes the parameter {name} in place, so it has no Fisher there")

    def _call(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            return self.module(**inputs)
        return self.module(*inputs) if isinstance(inputs, tuple | list) else self.module(inputs)

    def joins_samples(self) -> bool:
        """Whether the forward pass, inside :meth:`at`, wrote what samples behind it in the batch may have read.

        One sample alone would then have been computed with something else.
        """
        written = any(
            registry.get(leaf) is not self._buffers[name].tensor or self._buffers[name].changed
            for registry, leaf, name in self._slots
            if name in self._buffers and self._buffers[name].tensor.is_floating_point()
        )
        return written or self._tied_and_shortened


class _Private:
    """A copy of a tensor, made again where it was written to."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._copy()

    def _copy(self) -> None:
        self.tensor = self._source.detach().clone()
        self._version = self.tensor._version

    @property
    def changed(self) -> bool:
        return self.tensor._version != self._version

    def fresh(self) -> Tensor:
        if self.changed:
            self._copy()
        return self.tensor


class _Contents:
    """What a container holds, and the values of the tensors among it, but for those in ``known``."""

    def __init__(self, container: Any, known: Collection[int]) -> None:
        self._container = container
        self._saved = copy(container)
        entries = container.values() if isinstance(container, dict) else container
        loose = [x for x in entries if isinstance(x, Tensor) and id(x) not in known and not x.is_inference()]
        self._values = {x: (x._version, x.detach().clone()) for x in loose}

    def restore(self) -> None:
        if not self._same():
            self._container.clear()
            put = self._container.extend if isinstance(self._container, list | deque) else self._container.update
            put(self._saved)
        for x, (version, values) in self._values.items():
            if x._version != version:
                with torch.no_grad():
                    x.copy_(values)
                self._values[x] = x._version, values

    def _same(self) -> bool:
        now, saved = self._container, self._saved
        if isinstance(now, dict):
            return now.keys() == saved.keys() and all(map(is_, now.values(), saved.values()))
        return now == saved if isinstance(now, set) else len(now) == len(saved) and all(map(is_, now, saved))
