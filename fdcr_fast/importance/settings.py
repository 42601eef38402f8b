"""What modules and functions were made with: equal for those that behave alike, as far as is seen without a call."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_VALUES = frozenset((bool, int, float, complex, str, bytes, type(None), CodeType, torch.dtype, torch.device))
_TENSORS = (Tensor, np.ndarray)
_REFERENCES = (type, BuiltinFunctionType)
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("hooks"))
# Longer containers are data, of which the length counts, and so is what lies deeper inside a module, by its type.
_LONGEST = 1000
_DEEPEST = 8


def settings_of(thing: Any) -> Hashable:
    """Types, attributes and hooks of a module and of all that it is made of; shapes and dtypes of tensors, not values.

    Classes are told apart by identity, as long as they live; functions by their code and by what they close over.
    """
    settings: Hashable = _Reader().read(thing, 0)
    return settings


class _Reader:
    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # what was read, numbered: all of it once, whatever refers to it

    def read(self, x: Any, depth: int) -> Any:
        if type(x) in _VALUES or isinstance(x, Enum) or (type(x) is tuple and _VALUES.issuperset(map(type, x))):
            return x
        if isinstance(x, _TENSORS):
            return tuple(x.shape), x.dtype
        if isinstance(x, _REFERENCES):
            return weakref.ref(x)
        if id(x) in self._met:
            return self._met[id(x)][0]
        self._met[id(x)] = len(self._met), x
        depth = 0 if isinstance(x, nn.Module) else depth + 1
        kind, content = weakref.ref(type(x)), _content(x)
        if depth > _DEEPEST or len(content) > _LONGEST:
            return kind, len(content)
        if isinstance(content, dict):
            return kind, tuple([(self.read(key, depth), self.read(value, depth)) for key, value in content.items()])
        return kind, (frozenset if isinstance(x, set | frozenset) else tuple)([self.read(y, depth) for y in content])


def _content(x: Any) -> dict[Any, Any] | list[Any]:
    if isinstance(x, nn.Module):  # hooks without their numbers
        return {name: [*y.values()] if name in _HOOKS else y for name, y in vars(x).items() if name not in _HOOKS or y}
    if isinstance(x, dict):
        return x
    if isinstance(x, list | tuple | set | frozenset | deque):
        return list(x)
    if isinstance(x, FunctionType):
        return [x.__module__, x.__code__, x.__defaults__, x.__kwdefaults__, *(x.__closure__ or ())]
    if isinstance(x, CellType):
        return [] if x == CellType() else [x.cell_contents]
    if isinstance(x, MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    return getattr(x, "__dict__", {})
