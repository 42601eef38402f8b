"""How parameters are cut into shards."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fdcr_fast import shard_range


@given(num_params=st.integers(1, 10**9) | st.integers(1, 10**5), world=st.integers(1, 300))
def test_shards_are_neighbours_of_about_equal_size(num_params, world):
    assume(world <= num_params)
    shards = [shard_range(num_params, rank, world) for rank in range(world)]
    assert (shards[0].start, shards[-1].stop) == (0, num_params)
    assert all(a.stop == b.start for a, b in pairwise(shards))
    sizes = [shard.stop - shard.start for shard in shards]
    block = 4096 * -(-num_params // (4096 * 256))
    assert min(sizes) > 0
    if -(-num_params // block) >= world:
        assert all(shard.start % block == 0 for shard in shards)
        assert max(sizes) - min(sizes) < 2 * block
    else:
        assert max(sizes) - min(sizes) <= 1


def test_shards_that_there_are_not():
    for rank in (-1, 3):
        with pytest.raises(ValueError, match=r"rank must be in \[0, 3\)"):
            shard_range(10, rank, 3)
    with pytest.raises(ValueError, match="2 parameters cannot be split over 3 ranks"):
        shard_range(2, 0, 3)
