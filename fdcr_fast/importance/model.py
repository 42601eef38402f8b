"""Which values a model is called with: its own, or those of a state dict by whatever names its tensors go by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdcr_fast.layout import as_tensor

_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile`` and of data parallelism.

    Raises:
        TypeError: It is no module, or one of TorchScript, whose parameters cannot be exchanged.
        ValueError: A parameter has no values.
    """
    while True:
        if isinstance(model, _DATA_PARALLEL):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
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


class Names:
    """Parameters and buffers of a model by any of their names, with or without what wrappers add to these.

    Attributes:
        tensors: The tensors by all names in the model, several for a tied one.
        first: The name that a tensor goes by, by all names: the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = dict(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        )
        names: dict[int, str] = {}
        self.first = {name: names.setdefault(id(x), name) for name, x in self.tensors.items()}
        self._without_wrappers = {_without_wrappers(name): name for name in self.tensors}

    def find(self, name: str) -> str | None:
        """The first name of the tensor that is meant, or None."""
        own = name if name in self.first else self._without_wrappers.get(_without_wrappers(name))
        return None if own is None else self.first[own]


def _without_wrappers(name: str) -> str:
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def values_of(model: nn.Module, state: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The model's parameters and buffers by their first names, with the entries of ``state`` in place of its own.

    Raises:
        ValueError: An entry that the model has not, or has in another shape, or two that differ for one tied tensor.
    """
    names = Names(model)
    given: dict[str, tuple[str, Tensor]] = {}
    for entry, value in (state or {}).items():
        name, x = names.find(entry), as_tensor(value)
        if name is None or names.tensors[name].shape != x.shape:
            expected = "no such entry" if name is None else f"{list(names.tensors[name].shape)}"
            raise ValueError(f"the model has {expected} for {entry} of state, got {list(x.shape)}")
        other, known = given.setdefault(name, (entry, x))
        if known is not x and not torch.equal(known, x):
            raise ValueError(f"{other} and {entry} are one tensor in the model, but two in state")
    own = {name: names.tensors[name] for name in names.first.values()}
    return {name: given[name][1].to(x.device) if name in given else x.detach() for name, x in own.items()}
