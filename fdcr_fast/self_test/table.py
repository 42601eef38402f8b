"""The checks as a table."""

from __future__ import annotations

import time
from collections.abc import Callable

from fdcr_fast.self_test.checks import checks


def self_test(show: Callable[[str], None] = print) -> bool:
    """Check this installation: takes about ten seconds, and needs torch and NumPy only.

    Every operator is compared with its reference on every backend that can be used here, one diagonal Fisher with the
    gradients of one sample after the other, and one round of FDCR and of CoalitionFDCR, from tensors and from a store,
    with the formula.

    Args:
        show: A function that takes the lines of the table as they come.

    Returns:
        Whether all is right.
    """
    show(f"{'check':38} {'backend':9} {'ms':>7}  result")
    start, passed = time.perf_counter(), []
    for check in checks():
        began = time.perf_counter()
        failure = check.failure()
        passed.append(failure is None)
        milliseconds = 1e3 * (time.perf_counter() - began)
        show(f"{check.name:38} {check.backend:9} {milliseconds:7.1f}  {f'FAILED: {failure}' if failure else 'ok'}")
    show(f"{sum(passed)} of {len(passed)} checks passed in {time.perf_counter() - start:.1f} s")
    return all(passed)
