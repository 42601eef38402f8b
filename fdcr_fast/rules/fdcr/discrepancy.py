"""From the sums of squared distances ``S_k`` to the discrepancies ``V_k`` that are clustered; tensors or arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


def mean_square(squared_distance: Any, num_params: int) -> Any:
    """``V_k = S_k / P``, the paper's eq. 9b."""
    return squared_distance / num_params


def euclidean(squared_distance: Any, num_params: int) -> Any:
    """``V_k = sqrt(S_k)``, the distance that the authors' published code takes."""
    return squared_distance**0.5


def cosine(squared_distance: Any, num_params: int) -> Any:
    """``V_k = 1 - cos(u_k, u)``, from the ``S_k`` of directions, which have length 1."""
    return squared_distance / 2


class Discrepancy(NamedTuple):
    """One row of the table: ``V_k`` from ``S_k`` and ``P``, and the power of the updates' scale that it grows with."""

    score: Callable[[Any, int], Any]
    power: int


SCORES = {"mse": Discrepancy(mean_square, 2), "l2": Discrepancy(euclidean, 1), "cosine": Discrepancy(cosine, 0)}
OF_DIRECTIONS = frozenset({"cosine"})  # those that are given the distances of directions
