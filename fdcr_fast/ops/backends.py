"""Which implementation of the operators is used, and why the others are not."""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fdcr_fast import _native
from fdcr_fast._version import __version__
from fdcr_fast.ops.operator import OPERATORS

CAPABILITY = (8, 0)  # of the oldest NVIDIA GPUs that the CUDA and Triton kernels are for


@dataclass(frozen=True)
class BackendStatus:
    """State of one implementation of the operators: whether it can be used here, and why or why not."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name.

    CPU tensors use ``cpu`` where it is usable; CUDA tensors ``cuda``, else ``triton``, each for the operators that it
    has; all others ``reference``. ``FDCR_FAST_BACKEND=reference`` in the environment switches all kernels off;
    ``=cpu``, ``=cuda`` or ``=triton`` makes the import fail where these cannot run, and ``=triton`` leaves ``cuda``
    out; ``FDCR_FAST_SIMD=avx512|avx2|baseline`` chooses the instruction set of ``cpu``.
    """
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpu": _cpu(),
        "triton": _triton(),
        "cuda": _cuda(),
    }


def with_kernels(backend: str) -> set[str]:
    """Names of the operators that a backend for GPUs has kernels for."""
    return {name for name, operator in OPERATORS.items() if backend in operator.gpu_kernels}


def _cpu() -> BackendStatus:
    if not _native.loaded:
        return BackendStatus(False, _native.reason)
    if lacking := [name for name, operator in OPERATORS.items() if not operator.has_kernel("CPU")]:
        reason = f"{_native.LIBRARY} has no kernels for {', '.join(lacking)}: it is of another version, reinstall"
        return BackendStatus(False, reason)
    level = [] if _native.module is None else [_native.module.simd_level()]
    return BackendStatus(True, ", ".join(["compiled C++", *level, f"{torch.get_num_threads()} threads"]))


def _cuda() -> BackendStatus:
    if _native.cuda is None:
        return BackendStatus(False, _native.cuda_reason)
    if (reason := _no_gpu()) is not None:
        return BackendStatus(False, reason)
    build = _native.cuda.build_info()
    reason = f"compiled by CUDA {build['cuda']} for {build['architectures']}"
    by_triton = ", ".join(sorted(with_kernels("triton") - with_kernels("cuda")))
    return BackendStatus(True, f"{reason}; {by_triton} by triton, all others by the reference")


def _no_gpu() -> str | None:
    """Why there is no GPU that kernels of this library run on, or None if there is one."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    found = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if found >= CAPABILITY else f"needs compute capability {_dotted(CAPABILITY)}, found {_dotted(found)}"


def _triton() -> BackendStatus:
    if _native.BACKEND == "reference":
        return BackendStatus(False, "switched off by FDCR_FAST_BACKEND=reference")
    if not _has_triton():
        return BackendStatus(False, "the package triton is not installed")
    if _native.INTERPRETED:
        return BackendStatus(True, "interpreted, on CPU tensors: for tests")
    if (missing := _no_gpu()) is not None:
        return BackendStatus(False, missing)
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
        return OPERATORS[name].reference(*args)
    kernels = importlib.import_module("fdcr_fast.ops.triton")  # and Triton, which takes a second: when first needed
    if not tensors:
        return getattr(kernels, name)(*args)
    with torch.cuda.device_of(tensors[0]):
        return getattr(kernels, name)(*args)


def _register() -> None:
    for name, find in (("cpu", _cpu), ("triton", _triton), ("cuda", _cuda)):
        if name == _native.BACKEND and not (status := find()).usable:
            raise ImportError(f"FDCR_FAST_BACKEND={name}: {status.reason}")
    nvidia = torch.version.cuda is not None  # tensors on AMD GPUs have the dispatch key CUDA, too
    if _native.BACKEND == "reference" or not _has_triton() or not (nvidia or _native.INTERPRETED):
        return
    key = "CPU" if _native.INTERPRETED else "CUDA"
    compiled = set() if _native.cuda is None else with_kernels("cuda")
    for name in with_kernels("triton") - compiled:
        OPERATORS[name].implement(key, partial(_on_device, name))


_register()


def cpu_model() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
