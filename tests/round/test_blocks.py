"""How parameters are cut into blocks, and sums over them are added."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fdcr_fast.round.blocks import BlockSums, cut, in_order, shard_range
from fdcr_fast.round.tiles import Span


@given(data=st.data(), blocks=st.integers(1, 40), together=st.sampled_from([1, 2, 4, 8, 64]))
def test_blocks_are_added_alike_however_they_are_dealt_out(data, blocks, together):
    values = torch.randn(blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(blocks)) * 10**9
    whole = BlockSums(together)
    for block, value in enumerate(values):
        whole.add(block, value)
    cuts = sorted(data.draw(st.lists(st.integers(0, blocks), max_size=5)))
    joined = BlockSums(together)
    for first, stop in pairwise([0, *cuts, blocks]):
        part = BlockSums(together)
        for block in range(first, stop):
            part.add(block, values[block])
        for node in part.nodes:
            joined.add(node.block, node.total, node.size)
    assert [node[:2] for node in joined.nodes] == [node[:2] for node in whole.nodes]
    assert torch.equal(in_order([n.total for n in joined.nodes]), in_order([n.total for n in whole.nodes]))
    assert len(whole.nodes) <= blocks // together + together.bit_length()


@given(
    data=st.data(),
    num_params=st.integers(1, 200),
    tile=st.integers(1, 70),
    first=st.integers(0, 50),
    K=st.integers(0, 2),
)
def test_spans_are_cut_where_they_should_be(data, num_params, tile, first, K):
    store = torch.full((-(-num_params // tile), K, tile), -1.0)
    columns = torch.arange(num_params, dtype=torch.float32)
    for p in range(num_params):
        store[p // tile, :, p % tile] = columns[p]
    stops = sorted(data.draw(st.sets(st.integers(0, num_params + 60))))
    parts = list(cut(Span(first, num_params, store, store), stops))
    assert [part.first for part in parts] + [first + num_params] == [first, *(p.first + p.num_params for p in parts)]
    ends = {part.first + part.num_params for part in parts}
    assert {stop for stop in stops if first < stop < first + num_params} <= ends
    for part in parts:
        tiles, _, length = part.updates.shape
        assert (tiles - 1) * length < part.num_params <= tiles * length
        row = part.updates.transpose(0, 1).flatten(1)[:, : part.num_params]
        assert torch.equal(row, columns[part.first - first :][: part.num_params].expand(K, -1))
        assert part.fishers.shape == part.updates.shape


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
