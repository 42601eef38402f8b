"""Packages whose public names are imported when one is asked for: until then nobody waits for PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def public_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names are those of its module ``_public``.

    Modules of the package are found as its attributes, too, whether they have been imported or not. They come first:
    those that ``_public`` imports import one another by way of the package.
    """
    namespace = vars(sys.modules[package])

    def load() -> None:
        public = import_module(f"{package}._public")
        namespace.update({name: getattr(public, name) for name in public.__all__}, __all__=public.__all__)

    def find(name: str) -> Any:
        if name == "__all__" or not name.startswith("_"):
            module = f"{package}.{name}"
            if find_spec(module) is not None:
                return import_module(module)
            load()
            if name in namespace:
                return namespace[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        load()
        return sorted(namespace)

    return find, names
