"""Hooks that forward passes register on their own tensors, of which the autograd graph shows nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fdcr_fast.fisher.model.switches import Switch

Hook = Callable[[Tensor], Any]

register: Callable[[Tensor, Hook], RemovableHandle] = Tensor.register_hook
"""``Tensor.register_hook``, not noticed."""

_thread = threading.local()


@contextmanager
def noticed() -> Iterator[list[Hook]]:
    """The hooks that this thread registers on tensors while the context is open."""
    before, _thread.hooks = getattr(_thread, "hooks", None), []
    try:
        with _registering:
            yield _thread.hooks
    finally:
        _thread.hooks = before


def _register(self: Tensor, hook: Hook) -> RemovableHandle:
    if (hooks := getattr(_thread, "hooks", None)) is not None:
        hooks.append(hook)
    return register(self, hook)


_registering = Switch(
    lambda: Tensor.register_hook, lambda function: setattr(Tensor, "register_hook", function), _register
)
