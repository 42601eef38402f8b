"""From the sum of squared distances ``S_k`` to the discrepancy ``V_k`` that is clustered."""

from __future__ import annotations

from torch import Tensor


def mean_square(squared_distance: Tensor, num_params: int) -> Tensor:
    """``V_k = S_k / P``, the paper's eq. 9b."""
    return squared_distance / num_params


def euclidean(squared_distance: Tensor, num_params: int) -> Tensor:
    """``V_k = sqrt(S_k)``, the distance that the authors' published code takes."""
    return squared_distance.sqrt()


SCORES = {"mse": mean_square, "l2": euclidean}
