"""From the sums of squared distances ``S_k`` to the discrepancies ``V_k`` that are clustered; tensors or arrays."""

from __future__ import annotations

from typing import Any


def mean_square(squared_distance: Any, num_params: int) -> Any:
    """``V_k = S_k / P``, the paper's eq. 9b."""
    return squared_distance / num_params


def euclidean(squared_distance: Any, num_params: int) -> Any:
    """``V_k = sqrt(S_k)``, the distance that the authors' published code takes."""
    return squared_distance**0.5


SCORES = {"mse": mean_square, "l2": euclidean}
