"""Settings of modules and functions: equal for those that behave alike, as far as can be seen without a call."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from enum import Enum
from functools import partial
from math import prod
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_VALUES = frozenset((bool, int, float, complex, str, bytes, range, type(None), CodeType, torch.dtype, torch.device))
_TENSORS = (Tensor, np.ndarray)
_KINDS_OF_VALUES = (Enum, str, np.generic)
_BOOLS = (torch.bool, np.dtype(bool))
_MOST_FLAGS = 64  # of one tensor; the values of others are data
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("hooks"))
_CODE = (FunctionType, staticmethod, classmethod, property)
_FIXED = ("builtins", "torch", "numpy", "collections", "functools", "types", "fdcr_fast")
# Longer containers are data, of which the length counts, and so is what lies deeper inside a module, by its type.
_LONGEST = 1000
_DEEPEST = 8


def settings_of(thing: Any) -> Hashable:
    """The types, attributes and hooks of a module and of all that it is made of; no values of tensors.

    Classes are told apart by identity, as long as they live, and by what they define; functions by their code, by what
    they close over, and by simple values among their global variables.
    """
    settings: Hashable = _Reader().read(thing, 0)
    return settings


class _Reader:
    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # what was read, numbered: all of it once, whatever refers to it

    def read(self, x: Any, depth: int) -> Any:
        if type(x) in _VALUES or isinstance(x, _KINDS_OF_VALUES):
            return x
        if type(x) is tuple and _VALUES.issuperset(map(type, x)):
            return x
        if isinstance(x, _TENSORS):
            return tuple(x.shape), x.dtype, _flags(x)
        if isinstance(x, BuiltinFunctionType):
            return weakref.ref(x)
        if id(x) in self._met:
            return self._met[id(x)][0]
        self._met[id(x)] = len(self._met), x
        depth = 0 if isinstance(x, nn.Module) else depth + 1
        if isinstance(x, type):
            return weakref.ref(x), self.read(_definition(x), depth)
        kind, content = self.read(type(x), depth), _content(x)
        if depth > _DEEPEST or len(content) > _LONGEST:
            return kind, len(content)
        if isinstance(content, dict):
            return kind, tuple([(self.read(key, depth), self.read(value, depth)) for key, value in content.items()])
        return kind, (frozenset if isinstance(x, set | frozenset) else tuple)([self.read(y, depth) for y in content])


def _flags(x: Tensor | np.ndarray[Any, Any]) -> tuple[bool, ...]:
    few = x.dtype in _BOOLS and prod(x.shape) <= _MOST_FLAGS and not getattr(x, "is_meta", False)
    return tuple(x.reshape(-1).tolist()) if few else ()


def _definition(cls: type) -> list[Any]:
    """The bases and definitions of a class; those of libraries that nobody changes are known by themselves."""
    if cls.__module__.partition(".")[0] in _FIXED:
        return []
    defined = vars(cls).items()
    return [*cls.__bases__, *((name, x) for name, x in defined if type(x) in _VALUES or isinstance(x, _CODE))]


def _globals(function: FunctionType) -> dict[str, Any]:
    """The flags and other simple values among the global variables that a function may read."""
    read = function.__globals__
    return {name: read[name] for name in function.__code__.co_names if name in read and type(read[name]) in _VALUES}


def _content(x: Any) -> dict[Any, Any] | list[Any]:
    if isinstance(x, nn.Module):  # hooks without their numbers
        return {name: [*y.values()] if name in _HOOKS else y for name, y in vars(x).items() if name not in _HOOKS or y}
    if isinstance(x, dict):
        return x
    if isinstance(x, list | tuple | set | frozenset | deque):
        return list(x)
    if isinstance(x, FunctionType):
        return [x.__module__, x.__code__, x.__defaults__, x.__kwdefaults__, _globals(x), *(x.__closure__ or ())]
    if isinstance(x, staticmethod | classmethod):
        return [x.__func__]
    if isinstance(x, property):
        return [x.fget]
    if isinstance(x, slice):
        return [x.start, x.stop, x.step]
    if isinstance(x, CellType):
        return [] if x == CellType() else [x.cell_contents]
    if isinstance(x, MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    slots = {name: getattr(x, name, None) for name in getattr(type(x), "__slots__", ()) if isinstance(name, str)}
    return {**slots, **getattr(x, "__dict__", {})}
