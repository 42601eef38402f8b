"""How much memory is left."""

from __future__ import annotations

from pathlib import Path


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
