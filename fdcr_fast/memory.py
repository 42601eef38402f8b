"""How much memory is left, and large tensors in memory that is quickly given and quickly found."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_HUGE_PAGE = 2 << 20
# Smaller ones glibc gives again, page by page as they were, when they are freed (its largest mmap threshold).
_ALWAYS_FRESH = 32 << 20


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU, *, lasting: bool = False) -> Tensor:
    """A tensor whose numbers are anything, large ones on the CPU in huge pages where the system gives them.

    Fresh memory comes page by page when it is written to: by 2 MiB instead of 4 KiB it takes about a quarter of the
    time, and rows whose pieces lie far apart are filled three times as fast.

    Args:
        size: Its shape.
        dtype: Its dtype.
        device: Its device.
        lasting: Whether it is kept from round to round. What is not is large only where its memory is always fresh.
    """
    nbytes = torch.Size(size).numel() * dtype.itemsize
    if nbytes < (_HUGE_PAGE if lasting else _ALWAYS_FRESH) or device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    return pages(nbytes).view(dtype).view(size)


def pages(nbytes: int) -> Tensor:
    """Bytes on the CPU, at least one, that begin with a page."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared pages are never huge
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def available_memory() -> int | None:
    """Bytes that this process can still take, by the system and by its control group; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int(group.joinpath("memory.max").read_text())  # "max" without a limit
        statistics = dict(line.split() for line in group.joinpath("memory.stat").read_text().splitlines())
        used = int(group.joinpath("memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):
        return available
    return min(available, max(limit - used, 0))


def giga(nbytes: int) -> str:
    """A size in a message."""
    return f"{nbytes / 2**30:.3g} GiB"
