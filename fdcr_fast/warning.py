"""Where a warning points."""

from __future__ import annotations

import sys


def callers_level() -> int:
    """The ``stacklevel`` with which a warning shows the line that called this library.

    Between two functions of the library there may be some of PyTorch's, as under ``vmap`` and ``no_grad``.
    """
    level = callers = 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("fdcr_fast.", "torch.")):
            break
        level, frame = level + 1, frame.f_back
        if name.startswith("fdcr_fast."):
            callers = level
    return callers
