from __future__ import annotations

import pytest

from fdcr_fast.sim.costs import Stopwatch


def test_the_stopwatch_adds_up_also_after_an_error() -> None:
    clock = Stopwatch()
    with pytest.raises(KeyError), clock.phase("fisher"):
        raise KeyError
    first = clock.seconds["fisher"]
    with clock.phase("fisher"):
        pass
    assert clock.seconds["fisher"] > first > 0
    assert clock.seconds["training"] == 0
