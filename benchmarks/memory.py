"""Peak growth in bytes of a process: ``memory.py MODEL THREADS`` prints JSON for forward, gradient, Fisher.

The resident set counts everything, also what the kernels and oneDNN allocate behind PyTorch's back. For it
to tell the truth, freed memory must go back to the system at once, so the allocator must map every block of
64 KiB and more by itself (``MALLOC_MMAP_THRESHOLD_=65536``, read when a process starts), and each measurement
begins with a trimmed heap and a new high-water mark. Everything runs once on one sample before, since
libraries keep what they set up once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def peak_growth(run: Callable[[], Any]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the current size
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def main(name: str, threads: int) -> None:
    import torch

    from benchmarks import peers
    from benchmarks.models import problem

    torch.set_num_threads(threads)
    whole = problem(name)
    contenders: dict[str, Callable[[Any], Callable[[], Any]]] = {
        "forward": lambda p: lambda: p.model(p.inputs),
        "plain": peers.batch_gradient,
        "fisher": peers.ours,
    }
    for make in contenders.values():
        make(whole.part(0, 1))()
    print(json.dumps({key: peak_growth(make(whole)) for key, make in contenders.items()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
