"""Published defences on the same stores and kernels, for comparison."""

from fdcr_fast.server.defenses.coordinatewise import RLR, CoordinateMedian, TrimmedMean
from fdcr_fast.server.defenses.dnc import DnC
from fdcr_fast.server.defenses.flame import FLAME
from fdcr_fast.server.defenses.foolsgold import FoolsGold, FoolsGoldState
from fdcr_fast.server.defenses.geometric_median import GeometricMedian
from fdcr_fast.server.defenses.krum import Bulyan, Krum, MultiKrum
from fdcr_fast.server.defenses.multi_metrics import MultiMetrics
from fdcr_fast.server.defenses.noise import CRFL
from fdcr_fast.server.defenses.server_data import Finetuning, FLTrust, ModelQuality, Sageflow

__all__ = [
    "CRFL",
    "FLAME",
    "RLR",
    "Bulyan",
    "CoordinateMedian",
    "DnC",
    "FLTrust",
    "Finetuning",
    "FoolsGold",
    "FoolsGoldState",
    "GeometricMedian",
    "Krum",
    "ModelQuality",
    "MultiKrum",
    "MultiMetrics",
    "Sageflow",
    "TrimmedMean",
]
