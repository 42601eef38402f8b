"""Snapshots of what a model's modules hold, which is put back after it was called."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.fisher.model.inventory import Inventory

_REGISTRIES = ("_parameters", "_buffers")
_CONTAINERS = (dict, list, set, deque, tuple)
_LONGEST = 1000


class Snapshot:
    """The contents of many containers, most of which are empty."""

    def __init__(self, containers: Iterable[Any], known: Collection[int]) -> None:
        containers = list(containers)
        self._filled = [_Contents(container, known) for container in containers if container]
        self._empty = [container for container in containers if not container]

    @classmethod
    def of_attributes(cls, inventory: Inventory) -> Snapshot:
        """A snapshot of the modules' attributes, of lists, sets and dictionaries in them, and of tensors in these."""
        attributes = [vars(module) for module in inventory.modules.values()]
        inside: dict[int, Any] = {}
        for each in attributes:
            for name, x in each.items():
                if isinstance(x, _CONTAINERS) and name not in _REGISTRIES:
                    _add_containers(x, inside)
        return cls([*attributes, *inside.values()], _own(inventory))

    @classmethod
    def of_registries(cls, inventory: Inventory) -> Snapshot:
        """A snapshot of which tensors are the modules' parameters and buffers."""
        modules = inventory.modules.values()
        return cls((vars(module)[name] for module in modules for name in _REGISTRIES), _own(inventory))

    def restore(self) -> None:
        """Puts everything back."""
        for contents in self._filled:
            contents.restore()
        if any(self._empty):
            for container in self._empty:
                container.clear()


def _add_containers(x: Any, found: dict[int, Any]) -> None:
    """Adds a list, set or dictionary and those in it, by their ids; long ones hold data."""
    if not isinstance(x, tuple):
        found[id(x)] = x
    if len(x) <= _LONGEST:
        for entry in x.values() if isinstance(x, dict) else x:
            if isinstance(entry, _CONTAINERS) and id(entry) not in found:
                _add_containers(entry, found)


def _own(inventory: Inventory) -> set[int]:
    return {id(registry[leaf]) for registry, leaf, _ in inventory.slots}


class _Contents:
    """The contents of a container, and the values of the tensors among them, but for those in ``known``."""

    def __init__(self, container: Any, known: Collection[int]) -> None:
        self._container = container
        kind = dict if isinstance(container, dict) else set if isinstance(container, set) else list
        self._saved: Any = kind(container)
        entries = container.values() if kind is dict else container
        loose = [x for x in entries if isinstance(x, Tensor) and id(x) not in known and not x.is_inference()]
        self._values = {x: (x._version, x.detach().clone()) for x in loose}

    def restore(self) -> None:
        if not self._same():
            self._put_back()
        for x, (version, values) in self._values.items():
            if x._version != version:
                with torch.no_grad():
                    x.copy_(values)
                self._values[x] = x._version, values

    def _put_back(self) -> None:
        now, saved = self._container, self._saved
        if isinstance(saved, dict) and [key for key in now if key in saved] == list(saved):
            # Attributes are never gone: another thread may look at the module before it waits for it.
            for key in now.keys() - saved.keys():
                del now[key]
        else:
            now.clear()
        put = now.extend if isinstance(saved, list) else now.update
        put(saved)

    def _same(self) -> bool:
        now, saved = self._container, self._saved
        if isinstance(saved, dict):
            return now.keys() == saved.keys() and all(map(is_, now.values(), saved.values()))
        if isinstance(saved, set):
            return bool(now == saved)
        return len(now) == len(saved) and all(map(is_, now, saved))
