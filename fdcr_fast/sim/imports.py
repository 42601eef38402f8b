"""Objects of the user's: named by where they can be imported from, ``package.module:name``, and called.

Whoever is named in a configuration is imported and called. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial, reduce
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, NamedTuple

GIVEN = "given"  # stands for the module of what cannot be imported
# Names of what the library has beside its tables, by kind: imported where it is asked for, as some needs an extra.
SHIPPED = {
    "attacks": {"trigger-words": "fdcr_fast.sim.attacks.text:TriggerWords"},
    "callbacks": {
        "tensorboard": "fdcr_fast.sim.loggers.tensorboard:TensorBoardLogger",
        "wandb": "fdcr_fast.sim.loggers.wandb:WandbLogger",
        "mlflow": "fdcr_fast.sim.loggers.mlflow:MLflowLogger",
    },
    "datasets": {
        "femnist": "fdcr_fast.sim.datasets.folders:femnist",
        "image-folder": "fdcr_fast.sim.datasets.folders:image_folder",
        "tiny-imagenet": "fdcr_fast.sim.datasets.folders:tiny_imagenet",
        "next-byte": "fdcr_fast.sim.datasets.text:next_byte",
        "python-topics": "fdcr_fast.sim.datasets.text:python_topics",
        "text-classes": "fdcr_fast.sim.datasets.text:text_classes",
    },
    "models": {
        "lstm": "fdcr_fast.sim.training.text:lstm",
        "transformer": "fdcr_fast.sim.training.text:transformer",
    },
}
_PATH = re.compile(r"[A-Za-z_][\w.]*:[\w.<>-]+")
_PLAIN = (type(None), bool, int, float, str)


class Name(NamedTuple):
    """What a configuration says of an object.

    Attributes:
        path: Where it can be imported from, or ``given:TYPE``.
        options: What it is called with.
    """

    path: str
    options: dict[str, Any]


def is_path(name: str) -> bool:
    """Whether this is an import path, as far as its form tells."""
    return _PATH.fullmatch(name) is not None


@cache
def installed(kind: str) -> Mapping[str, str]:
    """Import paths by name: ``SHIPPED``, and what installed packages add by entry points ``fdcr_fast.<kind>``."""
    added = {entry.name: entry.value for entry in entry_points(group=f"fdcr_fast.{kind}")}
    return {**added, **SHIPPED.get(kind, {})}


def is_users(kind: str, name: str) -> bool:
    """Whether a name is an import path, or one that an installed package has added."""
    return is_path(name) or name in installed(kind)


def imported(kind: str, name: str) -> Any:
    """The object that an import path names, or a name that an installed package has added.

    Raises:
        ValueError: it cannot be imported, with the reason.
    """
    path = installed(kind).get(name, name)
    module, _, attribute = path.partition(":")
    if module == GIVEN:
        raise ValueError(
            f"this run was given a {attribute} in Python that cannot be imported: give the same one again, as in "
            "fdcr_fast.sim.resume(folder, ...)"
        )
    try:
        return reduce(getattr, attribute.split("."), import_module(module))
    except Exception as error:  # the module is the user's, and so is whatever it raises
        script = "; it was defined in a script: resume there" if module == "__main__" else ""
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}{script}") from error


def name_of(value: Any) -> Name:
    """The name of a function, of a class, of a ``functools.partial`` of one with keywords, or of an object that is made
    by its class from plain values: a dataclass of such fields, or one without attributes.
    """
    path: str | None = _path_of(value)
    options: dict[str, Any] = {}
    if path is None and isinstance(value, partial) and not value.args:
        path, options = _path_of(value.func), dict(value.keywords)
    elif path is None and dataclasses.is_dataclass(value):
        path, options = _path_of(type(value)), changed_fields(value)
    elif path is None and not callable(value) and getattr(value, "__dict__", None) == {}:
        path = _path_of(type(value))
    if path is None or not _is_plain(options):
        return Name(f"{GIVEN}:{title(value)}", {})
    return Name(path, options)


def changed_fields(value: Any) -> dict[str, Any]:
    """The fields by name with which a dataclass was made, but for those that are as by default."""
    made_of = [field.name for field in dataclasses.fields(value) if field.init and not _is_default(field, value)]
    return {name: getattr(value, name) for name in made_of}


def title(value: Any) -> str:
    """What an object is called in messages: the name of a function or class, or of its own class."""
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def one_line(error: Exception) -> str:
    """The type of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def called(function: Callable[..., Any], options: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """What a function returns for these options and whatever else it asks for by a parameter of a known name."""
    try:
        parameters = set(signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        parameters = set()
    return function(**{name: known[name] for name in known if name in parameters and name not in options}, **options)


def _path_of(value: Any) -> str | None:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    try:
        found = reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return f"{module}:{name}" if found is value else None


def _is_default(field: dataclasses.Field[Any], owner: Any) -> bool:
    value = getattr(owner, field.name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    try:
        return bool(type(default) is type(value) and default == value)
    except Exception:  # values that cannot be compared, such as tensors
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return isinstance(value, _PLAIN) or (isinstance(value, list) and all(map(_is_plain, value)))
