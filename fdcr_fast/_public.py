"""The public names of :mod:`fdcr_fast`."""

from fdcr_fast import ops
from fdcr_fast._version import __version__
from fdcr_fast.distributed.param_shard import ParamShard
from fdcr_fast.fisher.diagonal import diagonal_fisher, diagonal_fisher_stacked
from fdcr_fast.layout import ParamLayout
from fdcr_fast.ops.backends import BackendStatus, backends, info
from fdcr_fast.round.blocks import shard_range
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.coalition.rule import CoalitionFDCR, CoalitionShare
from fdcr_fast.rules.coalition.state import CoalitionState
from fdcr_fast.rules.coordinatewise.alignins import AlignIns, Alignment
from fdcr_fast.rules.coordinatewise.median import CoordinateMedian
from fdcr_fast.rules.coordinatewise.rlr import RLR
from fdcr_fast.rules.coordinatewise.trimmed_mean import TrimmedMean
from fdcr_fast.rules.crfl import CRFL
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.rules.pairwise.bulyan import Bulyan
from fdcr_fast.rules.pairwise.dnc import DnC
from fdcr_fast.rules.pairwise.flame import FLAME
from fdcr_fast.rules.pairwise.foolsgold import FoolsGold, FoolsGoldState
from fdcr_fast.rules.pairwise.geometric_median import GeometricMedian
from fdcr_fast.rules.pairwise.gram import GramEstimate, GramView, estimate_gram, gram, grams
from fdcr_fast.rules.pairwise.krum import Krum, MultiKrum
from fdcr_fast.rules.pairwise.multi_metrics import MultiMetrics
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.result import AggregationResult, Selection
from fdcr_fast.rules.server_data.finetuning import Finetuning
from fdcr_fast.rules.server_data.fltrust import FLTrust
from fdcr_fast.rules.server_data.sageflow import Sageflow
from fdcr_fast.rules.server_options import ModelQuality
from fdcr_fast.state_dicts.aggregate import aggregate_state_dicts
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.store.update_store import UpdateStore

__all__ = [
    "CRFL",
    "FDCR",
    "FLAME",
    "RLR",
    "AggregationResult",
    "AggregationRule",
    "AlignIns",
    "Alignment",
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
