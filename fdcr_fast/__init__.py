"""Exact and fast Fisher Discrepancy Cluster and Rescale (FDCR) for federated learning."""

from fdcr_fast import ops
from fdcr_fast._version import __version__
from fdcr_fast.ops.backends import backends, info

__all__ = [
    "__version__",
    "backends",
    "info",
    "ops",
]
