"""Exact clustering of scores on a line: FINCH, 2-means, DBSCAN, each O(K log K) and without any random start.

Every function maps ``values [K]`` (finite) to labels ``[K]`` (int64) numbered by ascending cluster mean, so
that the highest label is the set with the largest mean. Values that are all equal, or a single one, make one
cluster. Labels depend on the values alone, never on their order.

Labels lie where the values do, in a tensor, or for values in a NumPy array (float64) in one. On a GPU nothing is copied
to the host and nothing waits: shapes and numbers of steps depend on ``K`` alone. Values there are not checked; labels
of values that are not finite mean nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Options = ParamSpec("Options")


def _clustering(
    label_sorted: Callable[Concatenate[Any, Options], Any],
) -> Callable[Concatenate[Any, Options], Any]:
    """Extend a function of ascending float64 values, not all equal and at most 1 in size, to any finite values."""

    @functools.wraps(label_sorted)
    def cluster(values: Any, /, *args: Options.args, **kwargs: Options.kwargs) -> Any:
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"expected a vector of finite values, got {values}")
        if isinstance(values, np.ndarray):
            return on_host(values, *args, **kwargs)
        scores = values.detach().double()
        if scores.device.type == "cpu":
            return torch.from_numpy(on_host(scores.numpy(), *args, **kwargs))
        if len(scores) == 1:
            return torch.zeros(1, dtype=torch.int64, device=scores.device)
        ascending, order = scores.sort()
        low, high = ascending[0], ascending[-1]
        exponent = torch.frexp(torch.maximum(-low, high))[1].long()
        found = label_sorted(_unit(ascending, exponent), *args, **kwargs)
        return torch.empty_like(order).scatter_(0, order, torch.where(low < high, found, 0))

    def on_host(scores: NDArray[np.float64], *args: Options.args, **kwargs: Options.kwargs) -> NDArray[np.int64]:
        """Labels of values on the host, by NumPy, whose calls take less time than PyTorch's."""
        order = scores.argsort()
        ascending = scores[order]
        low, high = ascending[0], ascending[-1]
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN comes last
            raise ValueError(f"expected a vector of finite values, got {scores}")
        labels = np.zeros_like(order)
        if low < high:
            exponent = math.frexp(max(-low, high))[1]
            labels[order] = label_sorted(np.ldexp(ascending, -exponent), *args, **kwargs)
        return labels

    return cluster


def _unit(values: Tensor, exponent: Tensor) -> Tensor:
    """The values over a power of two, which rounds nothing and keeps sums and squares of any float64 in range.

    As ``np.ldexp``; that of PyTorch goes through ``torch.pow``, which may round.
    """
    half = exponent // 2  # one factor might not be a number of float64
    return values * _two_to(-half) * _two_to(half - exponent)


def _two_to(exponent: Tensor) -> Tensor:
    """A power of two, by its bits."""
    return ((exponent + 1023) << 52).view(torch.float64)


def check_partition(partition: str | int) -> None:
    """Raise ValueError unless ``partition`` is one that :func:`finch` takes."""
    if partition not in ("first", "last") and not (type(partition) is int and partition >= 0):
        raise ValueError(f"partition must be 'first', 'last' or an int >= 0, got {partition!r}")


@_clustering
def finch(values: Any, partition: str | int = "first") -> Any:
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
    coarsest = len(values).bit_length()  # every cluster has at least two of the level below
    index = partition if isinstance(partition, int) else {"first": 0, "last": coarsest}[partition]
    labels = _labels_of_runs(values)
    if index == 0:
        return labels
    values, labels = torch.as_tensor(values), torch.as_tensor(labels)
    for _ in range(min(index, coarsest)):
        of_run = _labels_of_runs(_means(values, labels), labels[-1])
        coarser = of_run.index_select(0, labels)
        labels = torch.where(coarser[-1] > 0, coarser, labels)
    return labels


def _labels_of_runs(means: Any, last: Tensor | None = None) -> Any:
    """Numbers of the connected runs when each of the ascending means links to its nearer neighbour.

    They are a tensor or an array, as the means are. With ``last``, only the means of a tensor up to that number are
    there.
    """
    gaps = means[1:] - means[:-1]
    if last is not None:
        gaps = torch.where(torch.arange(len(gaps), device=means.device) < last, gaps, torch.inf)
    shorter = gaps[1:] < gaps[:-1]  # than the one on the left
    # A gap that is not shorter than the one on its left, and longer than that on its right, is nobody's link.
    apart = means != means
    apart[2:-1] = shorter[1:] > shorter[:-1]
    return apart.cumsum(0)


def _means(values: Tensor, labels: Tensor) -> Tensor:
    """Means of runs of ascending values by number; there may be fewer than ``K``, and NaN behind the last."""
    offsets = torch.searchsorted(labels, torch.arange(len(values) + 1, device=values.device))
    sums = torch.segment_reduce(values, "sum", offsets=offsets, initial=0, unsafe=True)
    first = values.index_select(0, offsets[:-1].clamp(max=len(values) - 1))
    last = values.index_select(0, (offsets[1:] - 1).clamp(min=0))
    return torch.clamp(sums / offsets.diff(), first, last)  # rounding must not disturb the order


@_clustering
def kmeans(values: Any) -> Any:
    """Exact 2-means: the split of the sorted values with the least within-cluster sum of squares.

    Of several equally good splits the lowest is taken.
    """
    xp = np if isinstance(values, np.ndarray) else torch
    centred = values - values.mean()
    centred = centred / abs(centred).max()
    below = centred.cumsum(0)[:-1]
    number = (values == values).cumsum(0) - 1
    # Least within is most between; the sum above is minus the sum below, since the values are centred.
    between = below * below / (number[1:] * (len(values) - number[1:]))
    between = xp.where(values[:-1] == values[1:], -1.0, between)
    return xp.where(number > between.argmax(), 1, 0)


def check_density(eps: float, min_samples: int) -> None:
    """Raise ValueError unless these are options that :func:`dbscan` takes."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, got {min_samples}")


@_clustering
def dbscan(values: Any, eps: float = 0.5, min_samples: int = 2) -> Any:
    """DBSCAN on standardised values; everything that it calls noise is one more set with a label of its own.

    A value with at least ``min_samples`` values (itself included) within ``eps`` is a core; runs of cores
    with gaps of at most ``eps`` are clusters; another value within ``eps`` of a core joins the nearest one
    (ties: the left one).

    Args:
        values: ``[K]``.
        eps: Radius in population standard deviations of the values. The default is scikit-learn's 0.5 on
            standardised values.
        min_samples: Number of values that make a core, at least 1, as in scikit-learn.
    """
    check_density(eps, min_samples)
    scores = torch.as_tensor(values)
    scores = scores - scores.mean()
    scores = scores / scores.abs().max()
    scores = scores / scores.std(correction=0)
    K = len(scores)
    core = (
        torch.searchsorted(scores, scores + eps, right=True) - torch.searchsorted(scores, scores - eps) >= min_samples
    )
    number = torch.arange(K, device=values.device)
    left = torch.where(core, number, -1).cummax(0).values  # the last core up to here, and the next one from here on
    right = torch.where(core, number, K).flip(0).cummin(0).values.flip(0)
    previous = torch.cat([left.new_full((1,), -1), left[:-1]])
    begins = core & ((previous < 0) | (scores - scores.index_select(0, previous.clamp(min=0)) > eps))
    run = begins.cumsum(0) - 1  # of the last core up to here
    to_left = torch.where(left >= 0, scores - scores.index_select(0, left.clamp(min=0)), torch.inf)
    to_right = torch.where(right < K, scores.index_select(0, right.clamp(max=K - 1)) - scores, torch.inf)
    nearest = torch.where(to_left <= to_right, left, right).clamp(0, K - 1)
    noise = run[-1] + 1
    found = torch.where(torch.minimum(to_left, to_right) <= eps, run.index_select(0, nearest), noise)
    return _by_ascending_mean(scores, found)


def _by_ascending_mean(values: Tensor, labels: Tensor) -> Tensor:
    in_order, order = labels.sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(len(values) + 1, device=values.device))
    sums = torch.segment_reduce(values.index_select(0, order), "sum", offsets=offsets, initial=0, unsafe=True)
    counts = offsets.diff()
    means = torch.where(counts > 0, sums / counts, torch.inf)
    return means.argsort(stable=True).argsort().index_select(0, labels)


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
