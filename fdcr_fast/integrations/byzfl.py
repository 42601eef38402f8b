"""ByzFL: our rules as its aggregators, callables that map a list of vectors to one.

aggregator = Aggregator(MultiKrum(num_byzantine=3))
server.robust_aggregator = RobustAggregator(aggregator, [{"name": "Clipping", "parameters": {"c": 2.0}}])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.store.upload import tensor_view

try:
    import byzfl
except ImportError as error:
    raise ImportError("fdcr_fast.integrations.byzfl needs ByzFL: pip install 'fdcr_fast[byzfl]'") from error

Vectors: TypeAlias = Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]]


def squared(vectors: Sequence[Any]) -> list[Tensor]:
    """Fishers ``F_k = g_k^2`` of gradients ``g_k``: exact where each is that of one sample, else a rough stand-in.

    The square of a mean over a batch is not the mean of the squares, which is what
    :func:`fdcr_fast.diagonal_fisher` gives.
    """
    return [tensor_view(vector) ** 2 for vector in vectors]


class Aggregator:
    """A rule as an aggregator of ByzFL, for vectors ``[P]`` that are gradients, momenta or updates.

    All vectors count alike, as in ByzFL, and they are clients 0 to K - 1 in their order. One that cannot be used (of
    another length than most, not of floating point, not finite, without a usable Fisher) rejects its client with a
    reason, and is left out. If nobody is kept the result is a vector of zeros: no step.

    Args:
        rule: A rule.
        fishers: ByzFL passes no Fishers. For rules that take them, what gives those of a call: a function of its
            vectors, such as :func:`squared`, or one that ignores them and returns what clients sent beside them. Its
            entries may be None for clients that sent none.

    Attributes:
        result: What the rule did in the last call, of type :class:`fdcr_fast.AggregationResult`; None before.

    Raises:
        ValueError: the rule takes Fishers, and ``fishers`` is not given.
    """

    def __init__(self, rule: AggregationRule, fishers: Callable[[Sequence[Any]], Sequence[Any]] | None = None) -> None:
        if rule.needs_fishers and fishers is None:
            raise ValueError(f"{rule!r} takes Fishers, which ByzFL does not pass on: give fishers=")
        self.rule = rule
        self.fishers = fishers
        self.result: AggregationResult | None = None

    def __call__(self, vectors: Vectors) -> Any:
        """The rule's mean, of the type that came in (arrays or tensors), in float32 or the vectors' dtype if wider.

        Raises:
            ValueError: there are no vectors, or the function for Fishers gives another number.
        """
        if len(vectors) == 0:
            raise ValueError("expected at least one vector")
        num_params, dtype = _usual(vectors)
        sent = list(vectors)  # so that each is checked by itself
        fishers = self.fishers(sent) if self.rule.needs_fishers and self.fishers is not None else None
        zeros = torch.zeros(num_params, dtype=dtype)
        self.result = self.rule.aggregate(zeros, sent, fishers, [1] * len(sent), on_empty="keep")
        params = self.result.params
        return params.numpy() if any(isinstance(v, np.ndarray) for v in vectors) else params


class RobustAggregator(byzfl.RobustAggregator):
    """ByzFL's pipeline of pre-aggregations with an aggregator that is given as an object.

    Args:
        aggregator: Any callable, such as an :class:`Aggregator`.
        pre_agg_list: See ``byzfl.RobustAggregator``.
    """

    def __init__(self, aggregator: Callable[[Vectors], Any], pre_agg_list: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__({"name": "Average", "parameters": {}}, pre_agg_list=list(pre_agg_list))
        self.aggregator = aggregator


def _usual(vectors: Vectors) -> tuple[int, torch.dtype]:
    """Length of most vectors, and the widest dtype of those that can be kept; no single client decides the length."""
    lengths: Counter[int] = Counter()
    dtype = torch.float32
    for vector in vectors:
        if isinstance(vector, Tensor | np.ndarray) and vector.ndim == 1:
            lengths[len(vector)] += 1
            if vector.dtype in (torch.float64, np.float64):
                dtype = torch.float64
    if not lengths:
        raise ValueError("expected vectors [P], as tensors or arrays, got none")
    return lengths.most_common(1)[0][0], dtype
