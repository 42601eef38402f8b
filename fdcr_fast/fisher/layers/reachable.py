"""Why the rule of a class of layers would never be called, as far as the class alone can show it."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator
from functools import lru_cache
from types import CodeType, FunctionType

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

USUAL_PARAMS = ("weight", "bias")


def why_never_called(layer: type[nn.Module], params: Collection[str] | None) -> str | None:
    """The reason why a rule that knows the parameters ``params`` would never be called, or None.

    ``params=None`` stands for those of ``USUAL_PARAMS`` that the class has.
    """
    if issubclass(layer, torch.jit.ScriptModule):
        return "modules of TorchScript are refused"
    if layer.forward is nn.Module.forward:
        return "it has no forward"
    if layer.forward is not layer.forward or hasattr(type(layer.forward), "__set__"):
        return "its forward is a property, or made anew by every look-up, so that calls cannot be recorded"
    if inspect.isabstract(layer):
        return "it is abstract, and its subclasses need rules of their own"
    if issubclass(layer, nn.RNNBase):
        return "recurrent layers are taken apart into linear maps, which need no rule"
    if issubclass(layer, LazyModuleMixin) and layer.cls_to_become is not None:
        return f"its modules become {layer.cls_to_become.__name__} when they are first called"
    return _why_no_parameters(layer, params)


def _why_no_parameters(layer: type[nn.Module], params: Collection[str] | None) -> str | None:
    attributes = [attribute for cls in layer.__mro__ if cls is not nn.Module for attribute in _attributes_of(cls)]
    made = {name for name, certain in attributes if certain}
    known = USUAL_PARAMS if params is None else params
    missing = set(known).difference(name for name, _ in attributes)
    if (params is None and len(missing) == len(known)) or (params is not None and missing):
        return (
            f"it has no parameter {' or '.join(name for name in known if name in missing)} (its code makes "
            f"{', '.join(sorted(made)) or 'none'}): name all that it has with params=, and declare by an annotation in "
            "the class what other code makes"
        )
    if unnamed := made.difference(known):
        return f"it also has the parameter {', '.join(sorted(unnamed))}: name all that it has with params="
    return None if known else "it has no parameters"


@lru_cache(maxsize=64)  # one base may be that of several layers
def _attributes_of(cls: type) -> frozenset[tuple[str, bool]]:
    """The attributes that a class declares or its methods set, and whether they are certainly parameters."""
    functions = (inspect.unwrap(member) for member in vars(cls).values() if isinstance(member, FunctionType))
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    declared = ((name, False) for name in inspect.get_annotations(cls))
    return frozenset((*declared, *(attribute for code in codes for attribute in _attributes_set_by(code))))


def _attributes_set_by(code: CodeType) -> Iterator[tuple[str, bool]]:
    """The attributes of ``self`` that a method sets, and whether they are certainly parameters.

    Parameters are set by an expression with ``Parameter`` in it, or by ``register_parameter``.
    """
    self = code.co_varnames[:1]
    made = registering = False
    loaded: object = None
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation == "STORE_ATTR" and loaded in self:
            yield value, made
        elif operation == "LOAD_CONST" and registering and isinstance(value, str):
            yield value, True
            registering = False
        if operation.startswith(("STORE_", "POP_")):  # the end of an expression: its value is stored, dropped or tested
            made = registering = False
        made |= value in ("Parameter", "UninitializedParameter")
        registering |= value == "register_parameter"
        loaded = value[-1] if isinstance(value, tuple) and value else value  # one instruction may load two
