"""What a run costs: wall time, time by phase, memory."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal, get_args

Phase = Literal["training", "fisher", "aggregation", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class WallClock:
    """Wall time between events."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the clock was made."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class Stopwatch:
    """Seconds spent by phase."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time spent in the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def begin_peak_rss() -> None:
    """Forget the largest resident memory so far, where the system can: another run begins in this process.

    Free memory that the C library keeps goes back to the system first.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
