"""What the server gives to rules that use its data."""

from __future__ import annotations

from torch import Tensor

from fdcr_fast.round.arguments import all_finite
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.store.upload import shown


def check_callable(rule: AggregationRule, name: str, result: str) -> None:
    """Raise TypeError unless an option of the rule can be called."""
    function = getattr(rule, name)
    if not callable(function):
        raise TypeError(f"{name} must be a function from global parameters [P] to {result}, got {shown(function)}")


def checked_vector(global_params: Tensor, value: Tensor, name: str) -> Tensor:
    """The vector that a caller's function gave, if it fits the global parameters, as one of these.

    It may lie in memory that the function goes on to use.
    """
    if not isinstance(value, Tensor) or value.shape != global_params.shape or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected {name} to return a floating-point tensor {list(global_params.shape)}, got {got}")
    value = value.detach().to(global_params)
    if not all_finite(value):
        raise ValueError(f"what {name} returned is not finite, as {global_params.dtype}")
    return value


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two vectors of one size and dtype are the same numbers."""
    return (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
