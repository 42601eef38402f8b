"""Who is refused before any rule looks, and what is said about it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

OnInvalid: TypeAlias = Literal["reject", "raise"]
OnEmpty: TypeAlias = Literal["raise", "keep"]
ON_INVALID, ON_EMPTY = get_args(OnInvalid), get_args(OnEmpty)

_SHOWN = 3  # reasons in a message about many clients
_LARGEST_SQUARE = sys.float_info.max / 8  # squared distances between updates reach 4 times their squared norms
FEWEST_SAMPLES, _MOST_SAMPLES = 1e-100, 1e100  # shares of counts in this range neither vanish nor overflow


def refuse(rejected: Mapping[Hashable, str], on_invalid: OnInvalid) -> None:
    """Raise ValueError with every client and reason, if there are any and ``on_invalid`` asks for it."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be one of {ON_INVALID}, got {on_invalid!r}")
    if on_invalid == "raise" and rejected:
        raise ValueError(reasons(rejected, len(rejected)))


def reasons(rejected: Mapping[Hashable, str], most: int = _SHOWN) -> str:
    """The first few reasons, in a message about many clients."""
    first = [f"client {client!r}: {reason}" for client, reason in itertools.islice(rejected.items(), most)]
    more = len(rejected) - len(first)
    return "; ".join([*first, *([f"and {more} more"] if more else [])])


def count_fits(num_samples: Any) -> Any:
    """Whether a sample count can be used; that of one client, or in an array those of all, as below."""
    return (num_samples > FEWEST_SAMPLES) & (num_samples < _MOST_SAMPLES)


def norm_fits(squared_norm: Any) -> Any:
    """Whether an update of this squared norm can be used: it is finite, and so are squared distances from it."""
    return squared_norm <= _LARGEST_SQUARE


def fisher_fits(fisher_min: Any, fisher_max: Any) -> Any:
    """Whether a Fisher of this range can be used: it is finite, and nowhere negative."""
    return (fisher_min >= 0) & (fisher_max < math.inf)


def rejection_reason(
    num_samples: float, squared_norm: float | None, fisher_min: float | None, fisher_max: float | None
) -> str | None:
    """Why a client's contribution cannot be used by any rule, from its statistics if known; None if it can."""
    if not count_fits(num_samples):
        return f"the sample count must be positive and finite, got {num_samples:g}"
    if squared_norm is not None and not norm_fits(squared_norm):
        return "the update is not finite, or too large to be squared in float64"
    if fisher_min is None or fisher_max is None or fisher_fits(fisher_min, fisher_max):
        return None
    if math.isfinite(fisher_min) and math.isfinite(fisher_max):
        return f"the Fisher has negative entries, the smallest is {fisher_min:g}"
    return "the Fisher is not finite"


def median_size(sizes: NDArray[np.float64]) -> float:
    """The lower median of those that are not zero; infinity where all are."""
    ascending = np.sort(sizes[sizes > 0])
    return float(ascending[(len(ascending) - 1) // 2]) if len(ascending) else math.inf
