"""Which implementation of the operators is used, and why the others are not."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from fdcr_fast import _native
from fdcr_fast._version import __version__


@dataclass(frozen=True)
class BackendStatus:
    """State of one implementation of the operators: whether it can be used here, and why or why not."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend by name. CPU tensors use ``cpu`` where it is usable, all others ``reference``.

    ``FDCR_FAST_BACKEND=reference`` in the environment switches the compiled kernels off, ``=cpu`` makes the import
    fail where they are missing; ``FDCR_FAST_SIMD=avx512|avx2|baseline`` chooses their instruction set.
    """
    native = _native.module
    if native is None:
        cpu = BackendStatus(False, _native.reason)
    else:
        cpu = BackendStatus(True, f"compiled C++, {native.simd_level()}, {torch.get_num_threads()} threads")
    none_yet = BackendStatus(False, "no kernels in this release: tensors on a GPU use the reference")
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpu": cpu,
        "triton": none_yet,
        "cuda": none_yet,
    }


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
