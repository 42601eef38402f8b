"""Buffers of a state, such as BatchNorm's running statistics: read from clients, and made new ones of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.store.upload import plain_tensor, tensor_view

_EXACT = 2.0**63 - 2.0**12  # sums of int64 that are smaller by float64's reckoning do not overflow


class Buffers:
    """The real numbers of a global state that are no parameters, by name.

    What clients changed is read into a mapping by name, of floating-point buffers in their values, of integer ones in
    their differences to the global ones: those are small where the numbers are not, and so stay exact.
    """

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self.own = own

    def read(self, name: str, value: Any, *, difference: bool) -> Tensor | None:
        """A copy of a client's buffer; None where it is the global one, as most are that nobody trains.

        Raises:
            ValueError: It is of another shape, or not finite where the global one is.
            TypeError: It is no tensor of real numbers.
        """
        own, value = self.own[name], plain_tensor(tensor_view(value))
        if value.shape != own.shape:
            raise ValueError(f"buffer {name} has shape {list(value.shape)}, expected {list(own.shape)}")
        if value.is_complex():
            raise TypeError(f"buffer {name} must be real, got {value.dtype}")
        value = value.to(own.device)
        if not own.is_floating_point():
            value = _as_difference(value, own, difference)
            if not value.isfinite().all():
                raise ValueError(f"buffer {name} is not finite")
            return value if value.any() else None
        if difference:
            # What is infinite in both states, such as a mask, differs by NaN.
            value = torch.where(own.isfinite(), own + value, own)
        copied: Tensor = value.to(own.dtype, copy=True)
        if not copied.isfinite().all():
            unchanged = (copied == own) | (copied.isnan() & own.isnan())
            if not (copied.isfinite() | unchanged).all():
                raise ValueError(f"buffer {name} is not finite")
            return None if unchanged.all() else copied
        return None if torch.equal(copied, own) else copied

    def combined(self, name: str, changed: Sequence[Tensor | None], weights: Tensor, trim: int | None) -> Tensor:
        """The new buffer from those of the clients that count, and their weights; see :func:`held_mean`.

        An entry that is not finite in the global state and for one of these clients stays as it is.
        """
        own = self.own[name]
        if all(value is None for value in changed):
            return own.detach().clone()
        floating = own.is_floating_point()
        unchanged = own if floating else torch.zeros_like(own)
        rows = torch.stack([(unchanged if value is None else value).double().flatten() for value in changed])
        mean = held_mean(rows, weights.to(rows.device), trim).view(own.shape)
        if not floating:
            return _moved(own, mean.round())
        return torch.where(rows.isfinite().all(0).view(own.shape), mean, own.double()).to(own.dtype)


def held_mean(values: Tensor, weights: Tensor, trim: int | None) -> Tensor:
    """The weighted mean of every column, held between the ``trim + 1`` smallest and the ``trim + 1`` largest value.

    So with at most ``trim`` attackers it lies between values of honest clients, whatever weights the attackers have
    got, and where no weight is extreme it is the plain weighted mean.

    Args:
        values: ``[K, n]`` in float64.
        weights: ``[K]``, not negative, of which one is positive.
        trim: At most ``(K - 1) // 2``; None for the plain weighted mean.
    """
    mean: Tensor = (weights / weights.sum()) @ values
    if trim is None:
        return mean
    ordered = values.sort(0).values
    return mean.clamp(ordered[trim], ordered[len(values) - 1 - trim])


def _as_difference(value: Tensor, own: Tensor, difference: bool) -> Tensor:
    """The difference to integers, float64."""
    if difference:
        return value.double()
    about = value.double() - own.double()
    return (
        about
        if value.is_floating_point()
        else torch.where(about.abs() < _EXACT, (value.long() - own.long()).double(), about)
    )


def _moved(own: Tensor, by: Tensor) -> Tensor:
    """Integers plus a whole number, within what their dtype can hold."""
    lowest, highest = torch.iinfo(own.dtype).min, min(torch.iinfo(own.dtype).max, torch.iinfo(torch.int64).max)
    about = own.double() + by
    near = (about.abs() < _EXACT) & (by.abs() < _EXACT)
    exact = own.long() + torch.where(near, by, 0.0).long()
    far = torch.where(about > 0, highest, lowest)
    return torch.where(near, exact.clamp(lowest, highest), far).to(own.dtype)
