"""Exact clustering of scores on a line: FINCH, 2-means, DBSCAN, each O(K log K) and without any random start.

Every function maps ``values [K]`` (finite) to labels ``[K]`` (int64) numbered by ascending cluster mean, so
that the highest label is the set with the largest mean. Values that are all equal, or a single one, make one
cluster. Labels depend on the values alone, never on their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Options = ParamSpec("Options")


def _clustering(
    label_sorted: Callable[Concatenate[Floats, Options], Labels],
) -> Callable[Concatenate[Tensor, Options], Tensor]:
    """Extend a function of ascending values, not all equal and at most 1 in size, to any finite values."""

    @functools.wraps(label_sorted)
    def cluster(values: Tensor, /, *args: Options.args, **kwargs: Options.kwargs) -> Tensor:
        scores = values.detach().cpu().double().numpy()
        if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
            raise ValueError(f"expected a vector of finite values, got {values}")
        order = np.argsort(scores)
        ascending = scores[order]
        # A power of two scales without rounding; it keeps sums and squares of any float64 in range.
        _, exponent = np.frexp(np.abs(ascending).max())
        ascending = np.ldexp(ascending, -exponent)
        labels = np.zeros(scores.size, dtype=np.int64)
        if ascending[0] < ascending[-1]:
            labels[order] = label_sorted(ascending, *args, **kwargs)
        return torch.from_numpy(labels)

    return cluster


def check_partition(partition: str | int) -> None:
    """Raise ValueError unless ``partition`` is one that :func:`finch` takes."""
    if partition not in ("first", "last") and not (type(partition) is int and partition >= 0):
        raise ValueError(f"partition must be 'first', 'last' or an int >= 0, got {partition!r}")


@_clustering
def finch(values: Floats, partition: str | int = "first") -> Labels:
    """First-neighbour clustering (Sarfraz et al., CVPR 2019), as the paper's eq. 10 uses it.

    Each value links to its nearer neighbour (ties: the left one), connected runs are clusters, each run is
    replaced by the mean of its original values, and so on until one cluster is left. Every level is a
    partition.

    Args:
        values: ``[K]``.
        partition: ``"first"``, the finest (that of the published code); ``"last"``, the coarsest with at
            least two clusters; ``i``, the i-th from the finest, or the last where there are fewer. Where even
            the finest has a single cluster, that is the result.
    """
    check_partition(partition)
    starts = np.arange(values.size)  # where the clusters of the current level begin
    levels: list[Labels] = []
    while starts.size > 1:
        starts = starts[_first_neighbour_runs(_means(values, starts))]
        if starts.size > 1 or not levels:
            levels.append(_labels_of_runs(starts, values.size))
    index = partition if isinstance(partition, int) else {"first": 0, "last": len(levels)}[partition]
    return levels[min(index, len(levels) - 1)]


def _first_neighbour_runs(means: Floats) -> NDArray[np.intp]:
    """Where the connected runs begin when each of the ascending means links to its nearer neighbour."""
    gaps = np.diff(means)
    links_right = np.append(True, gaps[1:] < gaps[:-1])  # value i to i + 1
    links_left = np.append(gaps[:-1] <= gaps[1:], True)  # value i + 1 to i
    return np.append(0, np.flatnonzero(~(links_right | links_left)) + 1)


def _means(values: Floats, starts: NDArray[np.intp]) -> Floats:
    ends = np.append(starts[1:], values.size)
    means = np.add.reduceat(values, starts) / (ends - starts)
    return np.clip(means, values[starts], values[ends - 1])  # rounding must not disturb the order


def _labels_of_runs(starts: NDArray[np.intp], size: int) -> Labels:
    begins = np.zeros(size, dtype=np.int64)
    begins[starts[1:]] = 1
    return np.cumsum(begins)


@_clustering
def kmeans(values: Floats) -> Labels:
    """Exact 2-means: the split of the sorted values with the least within-cluster sum of squares.

    Of several equally good splits the lowest is taken.
    """
    centred = values - values.mean()
    centred /= np.abs(centred).max()
    size = np.arange(1, values.size)
    below = np.cumsum(centred)[:-1]
    # Least within is most between; the sum above is minus the sum below, since the values are centred.
    between = below**2 / (size * (values.size - size))
    between[values[:-1] == values[1:]] = -1
    return (np.arange(values.size) > np.argmax(between)).astype(np.int64)


def check_density(eps: float, min_samples: int) -> None:
    """Raise ValueError unless these are options that :func:`dbscan` takes."""
    if not 0 < eps < np.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, got {min_samples}")


@_clustering
def dbscan(values: Floats, eps: float = 0.5, min_samples: int = 2) -> Labels:
    """DBSCAN on standardised values; everything that it calls noise is one more set with a label of its own.

    A value with at least ``min_samples`` values (itself included) within ``eps`` is a core; runs of cores
    with gaps of at most ``eps`` are clusters; another value within ``eps`` of a core joins the nearest one
    (ties: the left one).

    Args:
        values: ``[K]``.
        eps: Radius in population standard deviations of the values. The default is scikit-learn's 0.5 on
            standardised values.
        min_samples: As in scikit-learn; at least 1.
    """
    check_density(eps, min_samples)
    scores = values - values.mean()
    scores /= np.abs(scores).max()
    scores /= scores.std()
    neighbours = np.searchsorted(scores, scores + eps, "right") - np.searchsorted(scores, scores - eps, "left")
    cores = scores[neighbours >= min_samples]
    if cores.size == 0:
        return np.zeros(values.size, dtype=np.int64)
    run = np.append(0, np.cumsum(np.diff(cores) > eps))
    right = np.searchsorted(cores, scores).clip(max=cores.size - 1)
    left = (right - 1).clip(min=0)
    nearest = np.where(np.abs(scores - cores[left]) <= np.abs(cores[right] - scores), left, right)
    found = np.where(np.abs(scores - cores[nearest]) <= eps, run[nearest], run[-1] + 1)
    return _by_ascending_mean(scores, found)


def _by_ascending_mean(values: Floats, labels: Labels) -> Labels:
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(np.bincount(labels, weights=values) / counts))
    return rank[labels]


class Clustering(NamedTuple):
    """One row of the table: the function, and which settings of the rule it takes."""

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()

    def __call__(self, values: Tensor, settings: Any) -> Tensor:
        """Labels of ``values`` with the options read from the attributes of ``settings``."""
        return self.function(values, **{name: getattr(settings, name) for name in self.options})


CLUSTERINGS = {
    "finch": Clustering(finch, ("partition",)),
    "kmeans": Clustering(kmeans),
    "dbscan": Clustering(dbscan, ("eps", "min_samples")),
}
