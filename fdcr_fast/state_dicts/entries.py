"""Entries of a state dict: which are parameters, which are tied, which are buffers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout, as_tensor, by_plain_name, inner_module
from fdcr_fast.store.upload import plain_tensor, tensor_view

State: TypeAlias = Mapping[str, Any] | nn.Module

BATCH_NORM_STATISTICS = ("running_mean", "running_var")


def floating_layout(global_state: State) -> ParamLayout:
    """The layout of all floating-point entries, in which a tensor under several names is there once."""
    entries = entries_of(global_state)
    first: dict[Hashable, str] = {}
    for name, value in entries.items():
        if isinstance(value, Tensor | np.ndarray) and as_tensor(value).is_floating_point():
            first.setdefault(tensor_key(name, value), name)
    return ParamLayout.from_tensors({name: entries[name] for name in first.values()})


def parameter_layout(global_state: State) -> ParamLayout:
    """:func:`floating_layout` without BatchNorm's running statistics, and without masks that hold infinities."""
    entries = entries_of(global_state)
    names = (
        name
        for name in floating_layout(entries).names
        if not name.endswith(BATCH_NORM_STATISTICS) and not as_tensor(entries[name]).isinf().any()
    )
    return ParamLayout.from_tensors({name: entries[name] for name in names})


def without_ties(layout: ParamLayout, global_state: State, states: Sequence[Any]) -> ParamLayout:
    """A layout without entries that equal an earlier one in the global state and in most clients' states."""
    entries = entries_of(global_state)
    clients = [by_plain_name(entries_of(state)) for state in states if isinstance(state, Mapping | nn.Module)]
    plain = dict(zip(layout.names, by_plain_name(dict.fromkeys(layout.names)), strict=True))
    kept: list[str] = []
    tied: list[tuple[str, str]] = []
    for name in layout.names:
        alike = (first for first in kept if same_values(entries[name], entries[first]))
        counts = ((f, sum(same_values(c.get(plain[name]), c.get(plain[f])) for c in clients)) for f in alike)
        first = next((f for f, count in counts if 2 * count > len(states)), None)
        if first is None:
            kept.append(name)
        else:
            tied.append((name, first))
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return ParamLayout(tuple(kept), tuple(shapes[name] for name in kept), tuple(tied))


def layout_of(global_state: State) -> ParamLayout:
    """The layout of a module's parameters, or of those of a state dict as in :func:`parameter_layout`."""
    if isinstance(global_state, nn.Module):
        return ParamLayout.from_module(global_state)
    return parameter_layout(global_state)


def entries_of(state: Any) -> Mapping[str, Any]:
    """The entries by name of a state dict or a module."""
    if isinstance(state, nn.Module):
        state = inner_module(state).state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state dict or a module, got {type(state).__name__}")
    return state


def as_entry(value: Any) -> Any:
    """An entry of the global state; an array as a tensor."""
    return tensor_view(value) if isinstance(value, np.ndarray) else value


def known_ties(own: Mapping[str, Any], params: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """The parameter behind every entry that is one under another name."""
    names = set(params.values())
    owner = {tensor_key(name, own[name]): owner for name, owner in params.items()}
    found = {name: tied[name] for name in own if name not in params and tied.get(name) in names}
    same = {name: owner[key] for name, value in own.items() if (key := tensor_key(name, value)) in owner}
    return {**found, **{name: first for name, first in same.items() if name not in params}}


def same_values(one: Any, other: Any) -> bool:
    """Whether two of a state's entries have the same values."""
    if one is None or other is None:
        return False
    one, other = plain_tensor(tensor_view(one)), plain_tensor(tensor_view(other))
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    first = one.flatten()[:1], other.flatten()[:1]  # most differ there
    return torch.equal(*first) and torch.equal(one, other)


def tensor_key(name: str, value: Any) -> Hashable:
    """A key that is the same for entries that are the same tensor."""
    if isinstance(value, np.ndarray):
        value = as_entry(value)
    if not isinstance(value, Tensor) or value.numel() == 0:
        return name
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def is_real(value: Any) -> bool:
    """Whether a buffer is averaged: real numbers are, flags and complex numbers are not."""
    return isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex()


def entry_like(entry: Tensor | NDArray[Any], numbers: Tensor) -> Any:
    """A copy of numbers in the type and dtype of an entry, and on its device."""
    if isinstance(entry, np.ndarray):
        return numbers.cpu().numpy().astype(entry.dtype)
    return numbers.to(entry.device, entry.dtype, copy=True)


def copied(value: Any) -> Any:
    """An entry that has no memory in common with this one."""
    return value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
