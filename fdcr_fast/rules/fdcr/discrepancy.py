"""From the sums of squared distances ``S_k`` to the discrepancies ``V_k`` that are clustered; tensors or arrays."""

from __future__ import annotations

from typing import Any


def mean_square(squared_distance: Any, num_params: int, learning_rate: float) -> Any:
    """``V_k = S_k / P``, the paper's eq. 9b."""
    return squared_distance / learning_rate**2 / num_params


def euclidean(squared_distance: Any, num_params: int, learning_rate: float) -> Any:
    """``V_k = sqrt(S_k)``, the distance that the authors' published code takes."""
    return (squared_distance / learning_rate**2) ** 0.5


def cosine(squared_distance: Any, num_params: int, learning_rate: float) -> Any:
    """``V_k = 1 - cos(u_k, u)``, from the ``S_k`` of directions, which have length 1 at any learning rate."""
    return squared_distance / 2


SCORES = {"mse": mean_square, "l2": euclidean, "cosine": cosine}
OF_DIRECTIONS = frozenset({"cosine"})  # those that are given the distances of directions
