"""Exact and fast Fisher Discrepancy Cluster and Rescale (FDCR) for federated learning."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from fdcr_fast import _moved  # noqa: F401  # finds modules by their old names
from fdcr_fast._lazy import public_names
from fdcr_fast._version import __version__ as __version__

if TYPE_CHECKING:
    from fdcr_fast._public import *  # noqa: F403
    from fdcr_fast._public import __all__ as __all__
else:
    __getattr__, __dir__ = public_names(__name__)

# What the environment asks for is there or an error at once, and operators are registered at once with a PyTorch that
# nobody has to wait for.
if "torch" in sys.modules or not {"FDCR_FAST_BACKEND", "FDCR_FAST_SIMD"}.isdisjoint(os.environ):
    import_module("fdcr_fast.ops")
