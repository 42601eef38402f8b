from __future__ import annotations

import os

import pytest
import torch

from fdcr_fast.sim.costs import Stopwatch, begin_peak_rss, peak_rss_bytes


def test_the_stopwatch_adds_up_also_after_an_error() -> None:
    clock = Stopwatch()
    with pytest.raises(KeyError), clock.phase("fisher"):
        raise KeyError
    first = clock.seconds["fisher"]
    with clock.phase("fisher"):
        pass
    assert clock.seconds["fisher"] > first > 0
    assert clock.seconds["training"] == 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system has no /proc/self/clear_refs")
def test_a_new_run_forgets_how_much_memory_there_was() -> None:
    size = 2**28
    torch.ones(size, dtype=torch.uint8)
    most = peak_rss_bytes()
    begin_peak_rss()
    assert peak_rss_bytes() < most - size // 2
