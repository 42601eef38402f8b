"""Types of a rule's options, checked by their annotations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


def check_types(rule: Any) -> None:
    """Raise unless every option of a dataclass is of a type that it is annotated with.

    Integers and real numbers may be NumPy's; flags are no numbers. Options of other types than numbers, text, None and
    classes are not looked at.

    Raises:
        TypeError: An option of another type, such as text for a number.
    """
    cls: Any = type(rule)
    for name, allowed in _annotated(cls).items():
        value = getattr(rule, name)
        if not any(fits(value) for fits in allowed.values()):
            raise TypeError(f"{name} of {cls.__name__} must be {' or '.join(allowed)}, got {value!r}")


@cache
def _annotated(rule: type) -> dict[str, dict[str, Callable[[Any], bool]]]:
    """What every option may be, in words, with functions that tell."""
    hints = get_type_hints(rule)
    return {field.name: dict(map(_test, _members(hints[field.name]))) for field in fields(rule) if field.init}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _test(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    if hint is NoneType:
        return "None", lambda x: x is None
    if hint is bool:
        return "True or False", lambda x: isinstance(x, bool | np.bool_)
    if hint is int:
        return "an integer", lambda x: isinstance(x, Integral) and not isinstance(x, bool)
    if hint is float:
        return "a real number", lambda x: isinstance(x, Real) and not isinstance(x, bool)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint))), lambda x: x in get_args(hint)
    if isinstance(hint, type):
        return f"a {hint.__name__}", lambda x: isinstance(x, hint)
    return "of its type", lambda x: True
