"""Which implementation of the operators is used, and why the others are not."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from fdcr_fast import _native
from fdcr_fast._version import __version__
from fdcr_fast.ops import reference
from fdcr_fast.ops.network_schemas import NETWORK_OPERATORS
from fdcr_fast.ops.schemas import OPERATORS, checked

CAPABILITY = (8, 0)  # of the oldest NVIDIA GPUs that the Triton kernels are compiled for in the tests
WITHOUT_TRITON = frozenset(NETWORK_OPERATORS)  # operators that are plain PyTorch on GPUs, too


@dataclass(frozen=True)
class BackendStatus:
    """State of one implementation of the operators: whether it can be used here, and why or why not."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name.

    CPU tensors use ``cpu`` where it is usable, CUDA tensors ``triton``, all others ``reference``.
    ``FDCR_FAST_BACKEND=reference`` in the environment switches all kernels off; ``=cpu`` or ``=triton`` makes the
    import fail where these cannot run; ``FDCR_FAST_SIMD=avx512|avx2|baseline`` chooses the instruction set of ``cpu``.
    """
    native = _native.module
    if native is None:
        cpu = BackendStatus(False, _native.reason)
    else:
        cpu = BackendStatus(True, f"compiled C++, {native.simd_level()}, {torch.get_num_threads()} threads")
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpu": cpu,
        "triton": _triton(),
        "cuda": BackendStatus(False, "no kernels in this release"),
    }


def _triton() -> BackendStatus:
    if _native.BACKEND == "reference":
        return BackendStatus(False, "switched off by FDCR_FAST_BACKEND=reference")
    if not _has_triton():
        return BackendStatus(False, "the package triton is not installed")
    if _native.INTERPRETED:
        return BackendStatus(True, "interpreted, on CPU tensors: for tests")
    if torch.version.cuda is None:
        return BackendStatus(False, "this PyTorch was built without CUDA")
    if not torch.cuda.is_available():
        return BackendStatus(False, "PyTorch finds no CUDA device")
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(found) < CAPABILITY:
        return BackendStatus(False, f"needs compute capability {_dotted(CAPABILITY)}, found {_dotted(max(found))}")
    return BackendStatus(True, f"CUDA tensors on devices of compute capability {_dotted(CAPABILITY)} and above")


def _has_triton() -> bool:
    spec = find_spec("triton")
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def info() -> str:
    """Versions, instruction set, threads and backends, as printed by ``fdcr-fast info``."""
    lines = [
        f"fdcr_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"threads: {torch.get_num_threads()}",
    ]
    if _native.module is not None:
        build = _native.module.build_info()
        lines += [
            f"extension: {build['compiler']}, built with torch {build['torch']}, for {', '.join(build['simd_levels'])}",
            f"CPU supports: {', '.join(_native.module.cpu_features()) or 'baseline only'}; "
            f"in use: {_native.module.simd_level()}",
        ]
    else:
        lines.append(f"extension: {_native.reason}")
    for name, status in backends().items():
        lines.append(f"backend {name}: {'usable' if status.usable else 'not usable'} ({status.reason})")
    return "\n".join(lines)


def _on_device(name: str, *args: Any) -> Any:
    """The Triton kernel on the device of the tensors, or what stands in for it on older ones."""
    tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_cuda]
    if tensors and torch.cuda.get_device_capability(tensors[0].device) < CAPABILITY:
        return getattr(reference, name)(*args)
    kernels = importlib.import_module("fdcr_fast.ops.triton")  # and Triton, which takes a second: when first needed
    if not tensors:
        return getattr(kernels, name)(*args)
    with torch.cuda.device_of(tensors[0]):
        return getattr(kernels, name)(*args)


def _register() -> None:
    if _native.BACKEND == "triton" and not (status := _triton()).usable:
        raise ImportError(f"FDCR_FAST_BACKEND=triton: {status.reason}")
    nvidia = torch.version.cuda is not None  # tensors on AMD GPUs have the dispatch key CUDA, too
    if _native.BACKEND == "reference" or not _has_triton() or not (nvidia or _native.INTERPRETED):
        return
    key = "CPU" if _native.INTERPRETED else "CUDA"
    for name, (_, check, _) in OPERATORS.items():
        if name not in WITHOUT_TRITON:
            call: Callable[..., Any] = partial(_on_device, name)
            _library.impl(name, checked(check, call), key)


_library = torch.library.Library("fdcr_fast", "IMPL")
_register()
