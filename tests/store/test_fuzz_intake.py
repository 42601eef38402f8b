"""A little of ``fuzz_intake.py``; run the script for more."""

import os
import random

import pytest

import fdcr_fast
from tests.store import fuzz_intake


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_hostile_contributions_hurt_nobody():
    seed = 0 if os.environ.get("CI") else random.randrange(10**6)
    reasons = fuzz_intake.fuzz(10_000 if fdcr_fast.backends()["cpu"].usable else 1000, seed)
    assert len(reasons) > 10
