"""The parts of a model, by whatever names they go, and the values and the parameters that a caller means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from fdcr_fast.fisher.model.settings import settings_of
from fdcr_fast.layout import as_tensor, inner_module, plain_name


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile`` and of data parallelism.

    Raises:
        TypeError: It is no module, or one of TorchScript, whose parameters cannot be exchanged.
        ValueError: A parameter has no values.
    """
    model = inner_module(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise TypeError(
                f"{name or 'the model'} is a ScriptModule, whose parameters cannot be exchanged: "
                "pass the torch.nn.Module that it was made from"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"the parameter {name} is not initialised: call the model once before")
        if parameter.is_meta:
            raise ValueError(f"the parameter {name} has no values: it is on the meta device")
    return model


class Inventory:
    """A model's modules, parameters and buffers by name.

    Attributes:
        model: The model.
        modules: Its modules, each once.
        slots: The places of tensors: a module's registry, the name there, and the tensor's name.
        parameters: The parameters, each by its first name, in the order of ``named_parameters()``.
        buffers: The buffers, each by its first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.slots: list[tuple[dict[str, Any], str, str]] = []
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._first: dict[str, str] = {}  # the first name of a tensor, by all its names
        names: dict[int, str] = {}
        known = set()
        for prefix, module in model.named_modules(remove_duplicate=False):
            if new := module not in known:
                known.add(module)
                self.modules[prefix] = module
            for registry, found in ((module._parameters, self.parameters), (module._buffers, self.buffers)):
                for leaf, x in registry.items():
                    if x is None:
                        continue
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    first = self._first[name] = names.setdefault(id(x), name)
                    found[first] = x
                    if new:
                        self.slots.append((registry, leaf, first))
        plain: dict[str, set[str]] = {}
        for name, first in self._first.items():
            plain.setdefault(plain_name(name), set()).add(first)
        self._by_plain_name = {name: firsts.pop() for name, firsts in plain.items() if len(firsts) == 1}

    def find(self, name: str) -> str | None:
        """The first name of the tensor that is meant, whatever wrappers add to its names, or None."""
        return self._first.get(name) or self._by_plain_name.get(plain_name(name))

    @cached_property
    def settings(self) -> Hashable:
        """A key for all models that behave alike, as far as can be seen without a call."""
        return settings_of(self.model)

    @property
    def shared(self) -> set[str]:
        """The names of tensors that are in several places."""
        return {name for name, count in Counter(first for _, _, first in self.slots).items() if count > 1}


def values_of(inventory: Inventory, state: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The model's parameters and buffers by their first names, with the entries of ``state`` in place of its own.

    These become the model's dtypes, as ``load_state_dict`` does it.

    Raises:
        ValueError: An entry that the model has not, or has in another shape, or two that differ for one tied tensor;
            complex numbers for real ones.
    """
    own = {**inventory.parameters, **inventory.buffers}
    given: dict[str, tuple[str, Tensor]] = {}
    for entry, value in (state or {}).items():
        if entry.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:
            continue
        name, x = inventory.find(entry), as_tensor(value)
        if name is None or own[name].shape != x.shape:
            expected = "no such entry" if name is None else f"{list(own[name].shape)}"
            raise ValueError(f"the model has {expected} for {entry} of state, got {list(x.shape)}")
        if x.is_complex() and not own[name].is_complex():
            raise ValueError(f"the model has {own[name].dtype} for {entry} of state, got {x.dtype}")
        other, known = given.setdefault(name, (entry, x))
        if known is not x and not torch.equal(known, x):
            raise ValueError(f"{other} and {entry} are one tensor in the model, but two in state")
    return {name: given[name][1].to(x) if name in given else x.detach() for name, x in own.items()}


def listed(params: Iterable[str]) -> list[str]:
    """A list of the names that a caller gives, one alone or several."""
    return [params] if isinstance(params, str) else list(params)


def selected(inventory: Inventory, params: Iterable[str] | None) -> list[str]:
    """The names of the parameters wanted, in the model's order.

    Raises:
        ValueError: A name that no parameter has, no name at all, or parameters that are not real numbers.
    """
    parameters = inventory.parameters
    asked = list(dict(inventory.model.named_parameters())) if params is None else listed(params)
    found = {inventory.find(name): name for name in asked}
    if unknown := [name for own, name in found.items() if own not in parameters]:
        raise ValueError(f"the model has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}")
    if not found:
        raise ValueError("no parameters: the model has none, or params= names none")
    wanted = [name for name in parameters if name in found]
    if unreal := [f"{name} ({parameters[name].dtype})" for name in wanted if not parameters[name].is_floating_point()]:
        raise ValueError(
            f"no Fisher of parameters that are not real numbers, {', '.join(unreal)}: name the others with params="
        )
    return wanted
