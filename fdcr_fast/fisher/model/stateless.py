"""A model called with other values than its own, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules import module as _modules
from torch.utils.hooks import RemovableHandle

from fdcr_fast.fisher.model import workarounds
from fdcr_fast.fisher.model.inventory import Inventory
from fdcr_fast.fisher.model.snapshot import Snapshot
from fdcr_fast.fisher.model.values import Values


class Stateless:
    """A context manager in which a model is a function of its parameters.

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
        hooks: The hooks on gradients of its parameters, by name.
        hooked: Whether there are hooks on gradients at all, on parameters or on modules.
    """

    def __init__(self, inventory: Inventory, values: Mapping[str, Tensor]) -> None:
        self.module = inventory.model
        self._modules = inventory.modules.values()
        self._slots = inventory.slots
        self._values = Values(inventory, values)
        self.params = self._values.params
        self._parameters = inventory.parameters
        self.originals = {id(p): name for name, p in inventory.parameters.items()}
        hooked = {name: p._backward_hooks for name, p in inventory.parameters.items() if p._backward_hooks}
        self.hooks = {name: list(hooks.values()) for name, hooks in hooked.items()}
        self.hooked = (
            bool(self.hooks)
            or any(m._backward_hooks or m._backward_pre_hooks for m in self._modules)
            or bool(_modules._global_backward_hooks or _modules._global_backward_pre_hooks)
        )
        self._frozen = [p for p in inventory.parameters.values() if _can_be_frozen(p) and not p.requires_grad]
        self._inventory = inventory
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Stateless:
        self._hooks = workarounds.lay_out_gradients_of_batch_norms(self._modules)
        self._attributes = Snapshot.of_attributes(self._inventory)
        self._registries = Snapshot.of_registries(self._inventory)
        for p in self._frozen:  # graphs show whether they are used
            p.requires_grad_()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attributes.restore()
        self._registries.restore()
        for p in self._frozen:
            p.requires_grad_(False)
        for hook in self._hooks:
            hook.remove()

    def leaves(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters to differentiate by, of the classes that the model's own have."""
        return {name: _of_class(self.params[name].detach(), self._parameters[name]).requires_grad_() for name in names}

    def has_own_classes(self, names: Iterable[str]) -> bool:
        """Whether some of these parameters are of classes that ``torch.func`` would not keep."""
        return any(type(self._parameters[name]) not in _CLASSES for name in names)

    @contextmanager
    def at(self, params: Mapping[str, Tensor]) -> Iterator[Callable[[Any], Any]]:
        """The model at ``params`` instead of some of its parameters: a function of its inputs.

        It stays so until the end of the context, for whatever a backward pass computes again. Inside of
        transformations of ``torch.func``, what is written to tensors is only forgotten by :meth:`restore`, after them.
        """
        transformed = any(map(is_functorch_wrapped_tensor, params.values()))
        others = {name: x.detach() for name, x in self._values.params.items() if name not in params}
        values = {**others, **self._values.buffers, **params}
        self._attributes.restore()  # callers may have changed modes in between
        for registry, leaf, name in self._slots:
            registry[leaf] = values[name]
        for name, parameter in self._parameters.items():
            _pass_for(values[name], parameter)
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
            self._registries.restore()
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
        given = set(map(id, buffers.values()))
        made = any(
            x is not None and x.is_floating_point() and id(x) not in given
            for module in self._modules
            for x in module._buffers.values()
        )
        return exchanged or made or self._values.join_samples()


_CLASSES = (Tensor, nn.Parameter)


def _of_class(x: Tensor, parameter: Tensor) -> Tensor:
    return x if type(parameter) in _CLASSES else x.as_subclass(type(parameter))


def _can_be_frozen(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.is_leaf and not parameter.is_inference()


def _pass_for(x: Tensor, parameter: Tensor) -> None:
    """Makes a tensor look like a parameter to models that ask for that, or for attributes that they have set."""
    vars(x).update(vars(parameter), _is_param=True)


def _called_with(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
