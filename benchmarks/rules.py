"""One of every rule, as benchmarks measure and compare them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fdcr_fast import (
    CRFL,
    FDCR,
    FLAME,
    RLR,
    AggregationRule,
    AlignIns,
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
    ModelQuality,
    MultiKrum,
    MultiMetrics,
    Sageflow,
    TrimmedMean,
)

ATTACKERS = 0.2  # of the clients, for rules that assume how many there are

# From the number of attackers; what a server with data adds to the round takes no time here.
RULES: dict[str, Callable[[int], AggregationRule]] = {
    "FedAvg": lambda f: FedAvg(),
    "FedAvg, clipped": lambda f: FedAvg(clip="median"),
    "FDCR": lambda f: FDCR(),
    "CoalitionFDCR": lambda f: CoalitionFDCR(start="bold"),
    "CoordinateMedian": lambda f: CoordinateMedian(),
    "TrimmedMean": lambda f: TrimmedMean(num_byzantine=f),
    "Krum": lambda f: Krum(num_byzantine=f),
    "MultiKrum": lambda f: MultiKrum(num_byzantine=f),
    "Bulyan": lambda f: Bulyan(num_byzantine=f // 2),
    "GeometricMedian": lambda f: GeometricMedian(),
    "RLR": lambda f: RLR(threshold=f + 1),
    "FoolsGold": lambda f: FoolsGold(),
    "DnC": lambda f: DnC(num_byzantine=f),
    "FLAME": lambda f: FLAME(),
    "AlignIns": lambda f: AlignIns(),
    "CRFL": lambda f: CRFL(),
    "MultiMetrics": lambda f: MultiMetrics(),
    "FLTrust": lambda f: FLTrust(server_update=torch.ones_like),
    "Finetuning": lambda f: Finetuning(refine=lambda params: params),
    "Sageflow": lambda f: Sageflow(evaluate=lambda params: ModelQuality(0.5, 1.0)),
}
