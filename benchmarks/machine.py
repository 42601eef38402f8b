"""The machine that is measured: what it is, and what other processes take of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import fdcr_fast
from fdcr_fast.ops.backends import cpu_model

_BUSY_CORES, _BUSY_SPREAD = 0.2, 0.2
_IDLE_COLUMNS = {3, 4}  # of /proc/stat: idle, and waiting for the disk
_GUEST_COLUMNS = {8, 9}  # counted by the kernel as user time as well


@dataclass(frozen=True)
class Machine:
    """What times depend on besides the code: the processor, how much of it is used, and by which kernels."""

    cpu: str
    caches: str
    cores: int
    threads: int
    kernels: str

    @classmethod
    def this(cls) -> Machine:
        return cls(
            cpu=cpu_model(),
            caches=_caches(),
            cores=torch.multiprocessing.cpu_count(),
            threads=torch.get_num_threads(),
            kernels=fdcr_fast.backends()["cpu"].reason,
        )

    def __str__(self) -> str:
        caches = f" ({self.caches})" if self.caches else ""
        return f"{self.cpu}{caches}, {self.cores} cores, {self.threads} threads; {self.kernels}"


def _caches() -> str:
    """``L1d 32K, L2 512K, L3 32768K shared by cores 0-1`` of the first core; empty where the system does not say."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size, cores = (
            folder.joinpath(name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            shared = "" if cores == "0" else f" shared by cores {cores}"
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}{shared}")
    return ", ".join(found)


class Load:
    """What others took of the machine during a measurement.

    Attributes:
        others: Cores that other processes, and other guests of a virtual machine, kept busy; 0 where unknown.
    """

    others = 0.0

    def verdict(self, spread: float) -> str:
        """Why the machine counts as busy, or nothing.

        Args:
            spread: Distance of the quartiles of the yardstick's times, over their median.
        """
        reasons = []
        if self.others > _BUSY_CORES:
            reasons.append(f"others {self.others:.1f} cores")
        if spread > _BUSY_SPREAD:
            reasons.append(f"yardstick ± {50 * spread:.0f} %")
        return ", ".join(reasons)


@contextmanager
def watched() -> Iterator[Load]:
    """The load is known when the context ends."""
    load = Load()
    before = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield load
    after = time.perf_counter(), _busy_seconds(), _own_seconds()
    wall, everybody, own = (b - a for a, b in zip(before, after, strict=True))
    load.others = max(0.0, everybody - own) / wall


def _busy_seconds() -> float:
    """Seconds that the cores have been busy with anything since the system started."""
    try:
        columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    busy = (int(x) for i, x in enumerate(columns) if i not in _IDLE_COLUMNS | _GUEST_COLUMNS)
    return sum(busy) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
