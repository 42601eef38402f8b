"""Exact and fast Fisher Discrepancy Cluster and Rescale (FDCR) for federated learning."""

from fdcr_fast import ops
from fdcr_fast._version import __version__
from fdcr_fast.importance.fisher import diagonal_fisher, diagonal_fisher_stacked
from fdcr_fast.layout import ParamLayout
from fdcr_fast.ops.backends import BackendStatus, backends, info
from fdcr_fast.server.blocks import shard_range
from fdcr_fast.server.coalition.rule import CoalitionFDCR, CoalitionShare
from fdcr_fast.server.coalition.state import CoalitionState
from fdcr_fast.server.coalition.views import ParamGroups
from fdcr_fast.server.defenses import (
    CRFL,
    FLAME,
    RLR,
    Bulyan,
    CoordinateMedian,
    DnC,
    Finetuning,
    FLTrust,
    FoolsGold,
    FoolsGoldState,
    GeometricMedian,
    Krum,
    ModelQuality,
    MultiKrum,
    MultiMetrics,
    Sageflow,
    TrimmedMean,
)
from fdcr_fast.server.fdcr import FDCR
from fdcr_fast.server.fedavg import FedAvg
from fdcr_fast.server.gram import GramEstimate, GramView, estimate_gram, gram, grams
from fdcr_fast.server.rules import AggregationResult, AggregationRule, Selection
from fdcr_fast.server.sharded import ParamShard
from fdcr_fast.server.state_dicts import aggregate_state_dicts
from fdcr_fast.server.state_store import StateStore
from fdcr_fast.server.store import UpdateStore

__all__ = [
    "CRFL",
    "FDCR",
    "FLAME",
    "RLR",
    "AggregationResult",
    "AggregationRule",
    "BackendStatus",
    "Bulyan",
    "CoalitionFDCR",
    "CoalitionShare",
    "CoalitionState",
    "CoordinateMedian",
    "DnC",
    "FLTrust",
    "FedAvg",
    "Finetuning",
    "FoolsGold",
    "FoolsGoldState",
    "GeometricMedian",
    "GramEstimate",
    "GramView",
    "Krum",
    "ModelQuality",
    "MultiKrum",
    "MultiMetrics",
    "ParamGroups",
    "ParamLayout",
    "ParamShard",
    "Sageflow",
    "Selection",
    "StateStore",
    "TrimmedMean",
    "UpdateStore",
    "__version__",
    "aggregate_state_dicts",
    "backends",
    "diagonal_fisher",
    "diagonal_fisher_stacked",
    "estimate_gram",
    "gram",
    "grams",
    "info",
    "ops",
    "shard_range",
]
