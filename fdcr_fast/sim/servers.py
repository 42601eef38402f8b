"""Aggregation rules by name.

Rules in ``SERVERS`` are built from :class:`ServerOptions` alone: nothing in them says who is malicious.
``INFORMED_BASELINES`` are told, serve as yardsticks only, and are named so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdcr_fast import FDCR, CoalitionFDCR, FedAvg, ParamGroups
from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationRule, Selection


@dataclass(frozen=True)
class ServerOptions:
    """What a server may know; see :class:`fdcr_fast.FDCR`, and :class:`fdcr_fast.CoalitionFDCR` for the last two."""

    discrepancy: str
    cluster: str | None
    partition: str | int
    rescale: bool
    importance: bool
    norm_bound: float | None
    lr: float
    gate: bool
    groups: ParamGroups


def fedavg(_options: ServerOptions) -> AggregationRule:
    """The plain sample-weighted mean."""
    return FedAvg()


def fdcr(options: ServerOptions) -> AggregationRule:
    """The paper's rule with all its options."""
    return FDCR(
        discrepancy=options.discrepancy,
        cluster=options.cluster,
        partition=options.partition,
        rescale=options.rescale,
        importance=options.importance,
        norm_bound=options.norm_bound,
        learning_rate=options.lr,
    )


def coalition_fdcr(options: ServerOptions) -> AggregationRule:
    """Drop the clients that resemble each other most, over all rounds."""
    return CoalitionFDCR(groups=options.groups, gate=options.gate, norm_bound=options.norm_bound)


@dataclass(frozen=True)
class Oracle(AggregationRule):
    """Baseline that is told who is malicious, drops exactly them and averages the others by sample count."""

    attackers: frozenset[int]

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep whoever is not malicious."""
        return Selection(torch.tensor([client not in self.attackers for client in clients.clients]))


SERVERS: dict[str, Callable[[ServerOptions], AggregationRule]] = {
    "fedavg": fedavg,
    "fdcr": fdcr,
    "coalition-fdcr": coalition_fdcr,
}
INFORMED_BASELINES: dict[str, Callable[[frozenset[int]], AggregationRule]] = {"oracle": Oracle}
