"""Whether an installation works here: ``fdcr-fast info --self-test``, which needs no extra."""

from fdcr_fast.self_test.checks import Check, checks
from fdcr_fast.self_test.table import self_test

__all__ = ["Check", "checks", "self_test"]
