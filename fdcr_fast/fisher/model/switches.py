"""Switches of the whole process, which several threads may want to be set at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Switch:
    """A context manager in which a switch has another value; the last thread that leaves sets the one before.

    Args:
        read: The function that gives the switch's value.
        write: The function that sets it.
        value: The value inside of the context.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], value: Any = False) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._read()
                self._write(self._value)
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._write(self._before)
