"""Aggregation rules by name.

Rules in ``SERVERS`` are built from :class:`ServerOptions` alone: nothing in them says who is malicious.
``INFORMED_BASELINES`` are told, serve as yardsticks only, and are named so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdcr_fast import (
    CRFL,
    FDCR,
    FLAME,
    RLR,
    Bulyan,
    CoalitionFDCR,
    CoordinateMedian,
    DnC,
    FedAvg,
    Finetuning,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MultiKrum,
    MultiMetrics,
    ParamGroups,
    Sageflow,
    TrimmedMean,
)
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.byzantine import ByzantineRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.sim.server_data import ServerData


@dataclass(frozen=True)
class ServerOptions:
    """What a server may know.

    Attributes:
        discrepancy: Option of :class:`fdcr_fast.FDCR`, as are the next five.
        cluster: Option of FDCR.
        partition: Option of FDCR.
        rescale: Option of FDCR.
        importance: Option of FDCR.
        norm_bound: Option of FDCR.
        lr: Learning rate of the clients.
        gate: Option of :class:`fdcr_fast.CoalitionFDCR`.
        groups: Parameters of the model's head and features.
        num_byzantine: How many clients may be Byzantine, a public assumption.
        noise_seed: Seed of draws that clients must not foresee.
        data: The server's own data; None for a server without.
    """

    discrepancy: str
    cluster: str | None
    partition: str | int
    rescale: bool
    importance: bool
    norm_bound: float | None
    lr: float
    gate: bool
    groups: ParamGroups
    num_byzantine: int
    noise_seed: int
    data: ServerData | None

    def server_data(self) -> ServerData:
        """The server's data, for rules that need it.

        Raises:
            ValueError: there is none.
        """
        if self.data is None:
            raise ValueError("this rule needs data of the server: set server_samples")
        return self.data


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
    """Drop the clients that resemble each other most, over the last rounds."""
    return CoalitionFDCR(groups=options.groups, gate=options.gate, norm_bound=options.norm_bound)


def norm_clipping(_options: ServerOptions) -> AggregationRule:
    """FedAvg of updates clipped to the median norm."""
    return FedAvg(clip="median")


def median(_options: ServerOptions) -> AggregationRule:
    """The median of every parameter."""
    return CoordinateMedian()


def trimmed_mean(options: ServerOptions) -> AggregationRule:
    """The mean of every parameter without its extremes."""
    return TrimmedMean(num_byzantine=options.num_byzantine)


def krum(options: ServerOptions) -> AggregationRule:
    """The client with the closest neighbours."""
    return Krum(num_byzantine=options.num_byzantine)


def multi_krum(options: ServerOptions) -> AggregationRule:
    """The mean of the clients with the closest neighbours."""
    return MultiKrum(num_byzantine=options.num_byzantine)


def geometric_median(_options: ServerOptions) -> AggregationRule:
    """The point nearest to all updates."""
    return GeometricMedian()


def bulyan(options: ServerOptions) -> AggregationRule:
    """Krum, and then the mean around the median."""
    return Bulyan(num_byzantine=options.num_byzantine)


def foolsgold(_options: ServerOptions) -> AggregationRule:
    """Less weight for clients who push in one direction over the rounds."""
    return FoolsGold()


def rlr(options: ServerOptions) -> AggregationRule:
    """The mean, turned around where fewer agree on the sign than honest clients could alone."""
    return RLR(threshold=options.num_byzantine + 1)


def dnc(options: ServerOptions) -> AggregationRule:
    """The mean without outliers in the direction in which clients differ most."""
    return DnC(num_byzantine=options.num_byzantine, seed=options.noise_seed)


def flame(options: ServerOptions) -> AggregationRule:
    """The majority of the models, clipped and with noise."""
    return FLAME(seed=options.noise_seed)


def crfl(options: ServerOptions) -> AggregationRule:
    """FedAvg, clipped and with noise."""
    return CRFL(seed=options.noise_seed)


def multi_metrics(_options: ServerOptions) -> AggregationRule:
    """The clients that stand out least in three distances."""
    return MultiMetrics()


def fltrust(options: ServerOptions) -> AggregationRule:
    """Weights by direction, compared with training on the server's data."""
    return FLTrust(server_update=options.server_data().update)


def finetuning(options: ServerOptions) -> AggregationRule:
    """FedAvg, and then training on the server's data."""
    return Finetuning(refine=options.server_data().refine)


def sageflow(options: ServerOptions) -> AggregationRule:
    """Clients whose models are sure of what they say about the server's data, by their losses."""
    return Sageflow(evaluate=options.server_data().evaluate)


@dataclass(frozen=True)
class Oracle(AggregationRule):
    """Baseline that is told who is malicious, drops exactly them and averages the others by sample count."""

    sharded = True
    attackers: frozenset[int]

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep whoever is not malicious."""
        return Selection(torch.tensor([client not in self.attackers for client in clients.clients]))


SERVERS: dict[str, Callable[[ServerOptions], AggregationRule]] = {
    "fedavg": fedavg,
    "fdcr": fdcr,
    "coalition-fdcr": coalition_fdcr,
    "norm-clipping": norm_clipping,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "bulyan": bulyan,
    "foolsgold": foolsgold,
    "rlr": rlr,
    "dnc": dnc,
    "flame": flame,
    "crfl": crfl,
    "multi-metrics": multi_metrics,
    "fltrust": fltrust,
    "finetuning": finetuning,
    "sageflow": sageflow,
}
INFORMED_BASELINES: dict[str, Callable[[frozenset[int]], AggregationRule]] = {"oracle": Oracle}
NEED_DATA = frozenset({"fltrust", "finetuning", "sageflow"})
BYZANTINE: dict[str, type[ByzantineRule]] = {
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "bulyan": Bulyan,
    "dnc": DnC,
}


def assumed_byzantine(server: str, clients: int, wanted: int | None) -> int:
    """How many Byzantine clients a server assumes: by default 30 %, rounded down, or as many as its rule can stand.

    Raises:
        ValueError: there are not enough clients.
    """
    f = int(0.3 * clients + 1e-9) if wanted is None else wanted
    least = BYZANTINE.get(server, ByzantineRule).min_clients
    while wanted is None and f > 0 and least(f) > clients:
        f -= 1
    if server in BYZANTINE and least(f) > clients:
        raise ValueError(f"{server} with num_byzantine={f} needs at least {least(f)} clients, got {clients}")
    return f
