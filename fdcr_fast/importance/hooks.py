"""Hooks that forward passes register on their own tensors, of which the autograd graph shows nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Tensor], Any]

register: Callable[[Tensor, Hook], RemovableHandle] = Tensor.register_hook
"""``Tensor.register_hook``, not noticed."""

_lock = threading.Lock()
_noticing = 0  # contexts open in all threads
_thread = threading.local()


@contextmanager
def noticed() -> Iterator[list[Hook]]:
    """The hooks that this thread registers on tensors while the context is open."""
    global _noticing
    before, _thread.hooks = getattr(_thread, "hooks", None), []
    with _lock:
        _noticing += 1
        Tensor.register_hook = _register  # type: ignore[method-assign]
    try:
        yield _thread.hooks
    finally:
        _thread.hooks = before
        with _lock:
            _noticing -= 1
            if not _noticing:
                Tensor.register_hook = register  # type: ignore[method-assign]


def _register(self: Tensor, hook: Hook) -> RemovableHandle:
    if (hooks := getattr(_thread, "hooks", None)) is not None:
        hooks.append(hook)
    return register(self, hook)
