"""A model called with other values than its own, and left as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from fdcr_fast.importance import workarounds
from fdcr_fast.importance.model import Inventory
from fdcr_fast.importance.values import Values


class Stateless:
    """Context manager: the model as a function of its parameters.

    Every forward pass finds the model with the parameters and buffers that are given here, and with the attributes that
    its modules had when the context was entered. What a pass writes to them, it writes for itself: running statistics,
    counters, clipped weights, tensors stored on modules, entries of their lists and dictionaries. What such objects
    hold deeper inside is not looked at.

    Args:
        inventory: The model's, in the modes in which it is to be called.
        values: Its parameters and buffers by their first names, or others of these shapes.

    Attributes:
        module: The model itself.
        params: The parameters among ``values``.
        originals: Names of the model's own parameters, which no forward pass should find, by their ids.
        hooks: What hooks on its parameters make of gradients, by name.
        hooked: Whether there are hooks on gradients at all, on parameters or on modules.
    """

    def __init__(self, inventory: Inventory, values: Mapping[str, Tensor]) -> None:
        self.module = inventory.model
        self._modules = inventory.modules.values()
        self._slots = inventory.slots
        self._values = Values(inventory, values)
        self.params = self._values.params
        self.originals = {id(p): name for name, p in inventory.parameters.items()}
        hooked = {name: p._backward_hooks for name, p in inventory.parameters.items() if p._backward_hooks}
        self.hooks = {name: list(hooks.values()) for name, hooks in hooked.items()}
        self.hooked = bool(self.hooks) or any(m._backward_hooks or m._backward_pre_hooks for m in self._modules)
        self._attributes = _Snapshot()
        self._registries = _Snapshot()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Stateless:
        self._hooks = workarounds.lay_out_gradients_of_batch_norms(self._modules)
        own = {id(registry[leaf]) for registry, leaf, _ in self._slots}
        for module in self._modules:
            attributes = vars(module)
            self._attributes.add(attributes, own)
            for name, x in attributes.items():
                if isinstance(x, dict | list | set | deque):
                    (self._registries if name in ("_parameters", "_buffers") else self._attributes).add(x, own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attributes.restore()
        self._registries.restore()
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def at(self, params: Mapping[str, Tensor]) -> Iterator[Callable[[Any], Any]]:
        """The model at ``params`` instead of some of its parameters: a function of its inputs.

        It stays so until the end of the context, for whatever a backward pass computes again. Inside of
        transformations of ``torch.func``, what is written to tensors is only forgotten by :meth:`restore`, after them.
        """
        transformed = any(map(is_functorch_wrapped_tensor, params.values()))
        values = {**self._values.params, **self._values.buffers, **params}
        own = [registry[leaf] for registry, leaf, _ in self._slots]
        for registry, leaf, name in self._slots:
            registry[leaf] = values[name]
        if transformed:
            for module in self._modules:
                vars(module)["_apply"] = workarounds.refuse_conversion

        def call(inputs: Any) -> Any:
            output = _called_with(self.module, inputs)
            if not transformed:
                self._values.look()
            return output

        try:
            yield call
        finally:
            for (registry, leaf, _), x in zip(self._slots, own, strict=True):
                registry[leaf] = x
            self._attributes.restore()
            if not transformed:
                self.restore()

    def restore(self) -> None:
        """Forgets what forward passes wrote to parameters and buffers."""
        self._values.restore()

    def joins_samples(self) -> bool:
        """Whether the forward pass, inside :meth:`at`, wrote what samples behind it in the batch may have read.

        One sample alone would then have been computed with something else.
        """
        buffers = {name: x for name, x in self._values.buffers.items() if x.is_floating_point()}
        exchanged = any(
            name in buffers and registry.get(leaf) is not buffers[name] for registry, leaf, name in self._slots
        )
        return exchanged or self._values.join_samples()


def _called_with(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


class _Snapshot:
    """What containers hold, most of them nothing."""

    def __init__(self) -> None:
        self._filled: list[_Contents] = []
        self._empty: list[Any] = []

    def add(self, container: Any, known: Collection[int]) -> None:
        if container:
            self._filled.append(_Contents(container, known))
        else:
            self._empty.append(container)

    def restore(self) -> None:
        for contents in self._filled:
            contents.restore()
        if any(self._empty):
            for container in self._empty:
                container.clear()


class _Contents:
    """What a container holds, and the values of the tensors among it, but for those in ``known``."""

    def __init__(self, container: Any, known: Collection[int]) -> None:
        self._container = container
        kind = dict if isinstance(container, dict) else set if isinstance(container, set) else list
        self._saved: Any = kind(container)
        entries = container.values() if kind is dict else container
        loose = [x for x in entries if isinstance(x, Tensor) and id(x) not in known and not x.is_inference()]
        self._values = {x: (x._version, x.detach().clone()) for x in loose}

    def restore(self) -> None:
        if not self._same():
            self._container.clear()
            put = self._container.extend if isinstance(self._saved, list) else self._container.update
            put(self._saved)
        for x, (version, values) in self._values.items():
            if x._version != version:
                with torch.no_grad():
                    x.copy_(values)
                self._values[x] = x._version, values

    def _same(self) -> bool:
        now, saved = self._container, self._saved
        if isinstance(saved, dict):
            return now.keys() == saved.keys() and all(map(is_, now.values(), saved.values()))
        if isinstance(saved, set):
            return bool(now == saved)
        return len(now) == len(saved) and all(map(is_, now, saved))
