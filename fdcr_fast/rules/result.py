"""What a rule decides about a round, and what its caller is told."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates

_SHOWN = 8  # ids in the text of a result


@dataclass(frozen=True, repr=False)
class AggregationResult:
    """New global parameters, and what became of every client.

    Rows are the ``K`` clients of the matrices, or those that a store accepted. Vectors over clients lie on
    the CPU.

    Attributes:
        params: ``[P]``, dtype and device of the global parameters; with a shard, those of the shard.
        weights: Weight of each client in the mean, float64 ``[K]``; 0 for those dropped or rejected.
        scores: What the rule judges the clients by, as its class says, such as the discrepancy ``V_k`` of
            :class:`fdcr_fast.FDCR`; float64 ``[K]``, NaN for rejected clients and under rules that compute none.
        kept: bool ``[K]``, who was aggregated.
        labels: Cluster of each client by ascending mean discrepancy, int64 ``[K]``; -1 for rejected clients.
        clients: ``K`` client ids.
        rejected: Reason by client id of the clients whose contribution could not be used.
        explanation: What the rule says about each client, by client id; empty under rules that say nothing.
    """

    params: Tensor
    weights: Tensor
    scores: Tensor
    kept: Tensor
    labels: Tensor
    clients: tuple[Hashable, ...]
    rejected: dict[Hashable, str]
    explanation: Mapping[Hashable, Any] = field(default_factory=dict)

    @property
    def discrepancy(self) -> Tensor:
        """The ``scores``, by the name that they have in FDCR."""
        return self.scores

    @property
    def kept_clients(self) -> list[Hashable]:
        """Ids of those that were aggregated."""
        return [client for client, kept in zip(self.clients, self.kept.tolist(), strict=True) if kept]

    @property
    def dropped_clients(self) -> list[Hashable]:
        """Ids of those that the rule dropped; rejected clients are none of them."""
        dropped = ~self.kept & (self.labels >= 0)
        return [client for client, gone in zip(self.clients, dropped.tolist(), strict=True) if gone]

    def __repr__(self) -> str:
        params = f"[{self.params.numel()}] {self.params.dtype}".replace("torch.", "")
        parts = [f"AggregationResult(params={params}"]
        for name, ids in (("kept", self.kept_clients), ("dropped", self.dropped_clients)):
            parts.append(f"{name}={len(ids)} {_first_of(map(repr, ids))}")
        reasons = (f"{client!r}: {reason}" for client, reason in self.rejected.items())
        parts.append(f"rejected={len(self.rejected)} {_first_of(reasons)}")
        return ", ".join(parts) + ")"


def _first_of(texts: Iterable[str]) -> str:
    """The first few of many texts in brackets."""
    first = list(itertools.islice(texts, _SHOWN + 1))
    return "[" + ", ".join([*first[:_SHOWN], *(["..."] if len(first) > _SHOWN else [])]) + "]"


@dataclass(frozen=True)
class Selection:
    """What a rule decides about a round; rows of rejected clients are ignored.

    Attributes:
        kept: bool ``[K]``.
        scores: What the rule judges the clients by, float64 ``[K]``; None where it computes no such numbers.
        labels: int64 ``[K]``, or None for 0 where kept and 1 where dropped.
        weights: Weight of each client in the mean, float64 ``[K]``; None for shares of the samples.
        explanation: What else there is to say about each client, by client id.
    """

    kept: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    explanation: Mapping[Hashable, Any] = field(default_factory=dict)

    @property
    def discrepancy(self) -> Tensor | None:
        """The ``scores``, by their former name."""
        return self.scores


# What a rule decides, the weights of the clients, and the new parameters.
Outcome: TypeAlias = tuple[Selection, Tensor, Tensor]


def check_decision(rule: object, selection: Selection, clients: int) -> None:
    """Raise unless a rule has returned a decision about so many clients.

    Raises:
        TypeError: it is no :class:`Selection`, or one of other things than tensors.
        ValueError: what it says is not about each of the clients.
    """
    name = type(rule).__name__
    if not isinstance(selection, Selection):
        raise TypeError(f"{name} must return a Selection, it returned {selection!r:.100}")
    for what in ("kept", "scores", "labels", "weights"):
        value = getattr(selection, what)
        if value is None and what != "kept":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must return {what} as a tensor, it returned {value!r:.100}")
        if tuple(value.shape) != (clients,):
            raise ValueError(f"{name} must return {what} of {clients} clients, it returned {list(value.shape)}")
    if selection.kept.dtype != torch.bool:
        raise TypeError(f"{name} must return kept as True or False, it returned {selection.kept.dtype}")


def check_weights(rule: object, weights: Tensor) -> None:
    """Raise ValueError where the mean would be nothing, or anything."""
    if not np.isfinite(weights.numpy()).all():
        raise ValueError(f"{type(rule).__name__} must return finite weights, it returned {weights.tolist()}")


def result_of(clients: ClientUpdates, selection: Selection, weights: Tensor, params: Tensor) -> AggregationResult:
    """What is told about every client, of which those that were rejected have no score and no cluster."""
    kept, labels, scores = selection.kept, selection.labels, selection.scores
    if labels is None:
        labels = (~kept).long()
    if scores is None:
        scores = torch.full(kept.shape, torch.nan, dtype=torch.float64)
    if clients.rows is not None:
        kept = kept & clients.valid
        labels, scores = labels.where(clients.valid, -1), scores.where(clients.valid, torch.nan)
    return AggregationResult(
        params=params,
        weights=weights,
        scores=scores,
        kept=kept,
        labels=labels,
        clients=clients.clients,
        rejected=clients.rejected,
        explanation=selection.explanation,
    )
