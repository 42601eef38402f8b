"""How the parameters are cut into blocks and shards, and how sums over blocks are added in one order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.round.tiles import Span

_BLOCKS = 256  # at most; P up to this times STRETCH is summed in the order of a single process


def shard_range(num_params: int, rank: int, world: int) -> slice:
    """The parameters of one of ``world`` shards, in order and of about equal size: whole blocks.

    Blocks have a multiple of 4096 parameters, the fewest with which there are at most 256 of them. Where that makes
    fewer blocks than shards, as with more than 256 of them or with a small model, shards end anywhere.

    Args:
        num_params: ``P``.
        rank: Number of the shard, from 0.
        world: Number of shards.

    Raises:
        ValueError: there is no such shard, or there are fewer parameters than shards.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    bounds = block_bounds(num_params, world)
    return slice(bounds[first_block(bounds, rank, world)], bounds[first_block(bounds, rank + 1, world)])


def block_bounds(num_params: int, world: int) -> list[int]:
    """The parameters at which blocks begin, and the one behind the last block."""
    if num_params < world:
        raise ValueError(f"{num_params} parameters cannot be split over {world} ranks")
    size = ops.STRETCH * math.ceil(num_params / (ops.STRETCH * _BLOCKS))
    if math.ceil(num_params / size) < world:
        return [num_params * rank // world for rank in range(world + 1)]
    return [*range(0, num_params, size), num_params]


def first_block(bounds: Sequence[int], rank: int, world: int) -> int:
    """The first block of a rank, which comes after the last one of the rank before."""
    return (len(bounds) - 1) * rank // world


class BlockSum(NamedTuple):
    """The sum over ``size`` blocks from ``block`` on, a power of two of them."""

    block: int
    size: int
    total: Tensor


class BlockSums:
    """Sums over neighbouring blocks, of which those that make up a whole of ``together`` are added in a binary tree."""

    def __init__(self, together: int) -> None:
        self.together = together
        self.nodes: list[BlockSum] = []

    def add(self, block: int, total: Tensor, size: int = 1) -> None:
        """Take in the sum over the next ``size`` blocks."""
        node = BlockSum(block, size, total)
        while self.nodes and node.size < self.together:
            left = self.nodes[-1]
            if left.size != node.size or left.block % (2 * node.size) or left.block + left.size != node.block:
                break
            self.nodes.pop()
            node = BlockSum(left.block, 2 * node.size, left.total + node.total)
        self.nodes.append(node)


def in_order(values: Sequence[Tensor]) -> Tensor:
    """The sum of the values, from the first one on."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def cut(span: Span, stops: Sequence[int]) -> Iterator[Span]:
    """Parts of a span that end where it ends or at one of the stops; where that is within a tile, parts of it."""
    length = span.updates.shape[2]
    end = span.first + span.num_params
    begin = span.first
    for stop in [*(s for s in stops if begin < s < end), end]:
        while begin < stop:
            tile, column = divmod(begin - span.first, length)
            tiles = (
                math.ceil((stop - span.first) / length) - tile if stop == end else (stop - span.first) // length - tile
            )
            if column == 0 and tiles > 0:
                size = min(tiles * length, stop - begin)
                rows, columns = slice(tile, tile + tiles), slice(None)
            else:
                size = min(length - column, stop - begin)
                rows, columns = slice(tile, tile + 1), slice(column, column + size)
            fishers = None if span.fishers is None else span.fishers[rows, :, columns]
            yield Span(begin, size, span.updates[rows, :, columns], fishers)
            begin += size
