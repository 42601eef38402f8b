"""The only loader of what is compiled; remembers why it could not be loaded."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

BACKEND = os.environ.get("FDCR_FAST_BACKEND", "auto")
if BACKEND not in ("auto", "cpu", "cuda", "triton", "reference"):
    raise ImportError(f"FDCR_FAST_BACKEND={BACKEND!r}: expected auto, cpu, cuda, triton or reference")
# Triton's interpreter runs its kernels on CPU tensors, in the place of the compiled ones.
INTERPRETED = BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

LIBRARY = Path(__file__).with_name("libfdcr_fast.so")


def _library() -> tuple[bool, str]:
    """Load the library that registers the operators for the CPU with the PyTorch dispatcher."""
    if not LIBRARY.exists():
        return False, "not built: reinstall with a C++17 compiler and FDCR_FAST_BUILD=require to see why"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return False, f"the library does not load: {error.__cause__ or error}"
    return True, "loaded"


def _module(name: str, missing: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or None and why there is none."""
    try:
        return importlib.import_module(f"fdcr_fast.{name}"), "loaded"
    except ModuleNotFoundError:
        return None, missing
    except ImportError as error:
        return None, f"the extension does not load: {error}"


loaded = False  # the operators for the CPU
module: ModuleType | None = None  # of that library: what was built, and its instruction sets
if BACKEND == "reference":
    reason = "switched off by FDCR_FAST_BACKEND=reference"
elif INTERPRETED:
    reason = "Triton's interpreter takes its place (TRITON_INTERPRET=1)"
else:
    loaded, reason = _library()
    if loaded:
        module, reason = _module("_C", "loaded, but it has no module for this Python, which would say more")

if module is not None:
    try:
        module.simd_level()
    except ValueError as error:
        raise ImportError(f"FDCR_FAST_SIMD: {error}") from None

cuda: ModuleType | None = None  # looks for no GPU when it is loaded
if BACKEND in ("reference", "triton"):
    cuda_reason = f"switched off by FDCR_FAST_BACKEND={BACKEND}"
else:
    cuda, cuda_reason = _module(
        "_cuda", "not built: reinstall with a CUDA toolkit that fits torch's, and FORCE_CUDA=1 to see why"
    )
