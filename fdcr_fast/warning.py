"""Where a warning points."""

from __future__ import annotations

import sys


def callers_level() -> int:
    """The ``stacklevel`` with which a warning shows the line that called this library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fdcr_fast."):
        level, frame = level + 1, frame.f_back
    return level
