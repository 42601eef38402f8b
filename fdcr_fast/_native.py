"""The only loader of the compiled module; remembers why it could not be loaded."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

BACKEND = os.environ.get("FDCR_FAST_BACKEND", "auto")
if BACKEND not in ("auto", "cpu", "triton", "reference"):
    raise ImportError(
        f"FDCR_FAST_BACKEND={BACKEND!r}: expected auto, cpu, triton or reference (this release has no cuda kernels)"
    )
# Triton's interpreter runs its kernels on CPU tensors, in the place of the compiled ones.
INTERPRETED = BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

module: ModuleType | None = None
reason = "loaded"

if BACKEND == "reference":
    reason = "switched off by FDCR_FAST_BACKEND=reference"
elif INTERPRETED:
    reason = "Triton's interpreter takes its place (TRITON_INTERPRET=1)"
else:
    try:
        # Loading it registers the CPU operators with the PyTorch dispatcher.
        module = importlib.import_module("fdcr_fast._C")
    except ModuleNotFoundError:
        reason = "the extension was not built: reinstall with a C++17 compiler and FDCR_FAST_BUILD=require to see why"
    except ImportError as error:
        reason = f"the extension does not load: {error}"
    if module is None and BACKEND == "cpu":
        raise ImportError(f"FDCR_FAST_BACKEND=cpu: {reason}")

if module is not None:
    try:
        module.simd_level()
    except ValueError as error:
        raise ImportError(f"FDCR_FAST_SIMD: {error}") from None
