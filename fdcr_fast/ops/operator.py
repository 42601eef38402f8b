"""One operator, one function: schema, argument check, fake kernel and reference implementation under one name.

An operator is a function in the file of its family, decorated with :func:`operator`. Its docstring says what it
computes, its body computes that in plain PyTorch: the fallback on any device and the yardstick of the kernels. Whoever
calls it comes through the PyTorch dispatcher to the implementation for the device of the tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Elements of the largest temporary of a reference, 64 MiB of float64: work is done in blocks, so that no temporary
# grows with ``K * P`` or with the number of samples.
BLOCK_ELEMENTS = 1 << 23

OPERATORS: dict[str, Operator[..., Any]] = {}

_library = torch.library.Library("fdcr_fast", "FRAGMENT")


class Operator(Generic[P, R]):
    """An operator, called through the PyTorch dispatcher; ``torch.ops.fdcr_fast`` holds it under the same name.

    Attributes:
        reference: The function that computes it in plain PyTorch, from arguments that ``check`` accepts.
        check: The function of the same arguments that raises where they do not fit.
        gpu_kernels: The backends that have kernels for it on GPUs; the reference takes the place of the others.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        check: Callable[P, None],
        fake: Callable[..., R],
        gpu_kernels: tuple[str, ...],
        schema: str | None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.check = check
        self.gpu_kernels = gpu_kernels
        self._name = reference.__name__
        if schema is None:  # kernels take numbers, never symbols
            schema = torch.library.infer_schema(reference, mutates_args=()).replace("SymInt", "int")
        _library.define(self._name + schema)
        torch.library.register_fake(f"fdcr_fast::{self._name}", self.checked(fake), lib=_library)
        self.implement("CompositeExplicitAutograd", reference)
        self._dispatch = getattr(torch.ops.fdcr_fast, self._name)
        OPERATORS[self._name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the implementation for the device of the tensors."""
        return cast(R, self._dispatch(*args, **kwargs))

    def implement(self, dispatch_key: str, implementation: Callable[..., R]) -> None:
        """Make a function in Python, which gets to see only what the operator accepts, its implementation."""
        _library.impl(self._name, self.checked(implementation), dispatch_key)

    def has_kernel(self, dispatch_key: str) -> bool:
        """Whether tensors with this dispatch key have an implementation of their own, rather than the reference."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fdcr_fast::{self._name}", dispatch_key)

    def checked(self, implementation: Callable[..., R]) -> Callable[P, R]:
        """The implementation behind the check of its arguments."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            self.check(*args, **kwargs)
            return implementation(*args, **kwargs)

        return call


def operator(
    *,
    check: Callable[P, None],
    fake: Callable[..., R],
    gpu_kernels: tuple[Literal["cuda", "triton"], ...] = (),
    schema: str | None = None,
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator that makes a reference implementation an operator of the same name.

    Args:
        check: Function of the same arguments that raises where they do not fit.
        fake: Function of the same arguments that gives shapes and dtypes without data.
        gpu_kernels: Backends that have kernels for it on GPUs; all operators have kernels for the CPU.
        schema: Arguments and results in the language of the dispatcher, where they do not follow from the annotations:
            of operators that write to an argument or take strings.
    """
    return lambda reference: Operator(reference, check, fake, gpu_kernels, schema)


def check_floating(**tensors: Tensor) -> None:
    """Refuse tensors that are not floating point by their names."""
    for name, tensor in tensors.items():
        message = f"{name} must be floating point, got {tensor.dtype}"
        torch._check(tensor.is_floating_point(), functools.partial(str, message))
