"""One round over several processes of ``torch.distributed``, each with some of the parameters of all clients.

What decides about clients is a sum over parameters: K numbers, or K x K, of which every process computes its part.
Sums are taken over blocks of the parameters that depend on ``P`` alone, and the blocks' sums are added in one order,
wherever they were computed; so the result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fdcr_fast.distributed.joined import RoundPart, joined
from fdcr_fast.round.blocks import BlockSums, block_bounds, cut, first_block, in_order, shard_range
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shard import Shard
from fdcr_fast.round.tiles import Span
from fdcr_fast.store.upload import shown

_SUMS_BYTES = 64 << 20  # of blocks' sums that are kept apart; beyond, neighbours are added first

T = TypeVar("T")


class ParamShard(Shard):
    """The parameters ``shard_range(P, rank, world)`` of a process in a group of ``torch.distributed``.

    Every process keeps these parameters of all clients, in a store or in tensors, and calls ``rule.aggregate(w[own],
    store, shard=shard)`` with its part of the global parameters; all get the same result, each with its part of the new
    ones. For every client K numbers go from process to process, or K x K under rules that compare all pairs.

    A client counts if all processes have accepted its part with the same sample count. What one process has rejected
    all reject, with its reason.

    **Bits.** The result has the same bits for any number of ranks, if blocks suffice (see :func:`shard_range`) and the
    tiles of stores are a divisor or a multiple of 4096, as by default. Scores of models of up to a million parameters,
    and whatever rests on them alone, have the bits of a process that holds everything. All other sums are in float64,
    and differ from those by at most ``P 2^-53`` of the sum of their terms' sizes.

    Collectives run on the CPU, with ``nccl`` on the current device. How long one waits for the others is the timeout of
    the group (``init_process_group(timeout=)``).

    Args:
        num_params: ``P`` of the model.
        group: Group of the processes; None for all of them.

    Attributes:
        num_params: ``P`` of the model.
        params: Range of this process's parameters.
        first: First parameter of this process.
        rank: Number of this process in the group.
        world: Number of processes.

    Raises:
        ValueError: there are fewer parameters than processes.
        RuntimeError: there is no such group, or this process is not in it.
    """

    def __init__(self, num_params: int, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("there is no group of processes: call torch.distributed.init_process_group first")
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("this process is not in the group")
        self.num_params = num_params
        self.params = shard_range(num_params, self.rank, self.world)
        self.first = self.params.start
        self._group = group
        self._bounds = block_bounds(num_params, self.world)
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def __len__(self) -> int:
        return int(self.params.stop - self.params.start)

    def __repr__(self) -> str:
        return f"ParamShard({self.num_params}): [{self.first}, {self.params.stop}), rank {self.rank} of {self.world}"

    def sum(self, spans: Iterable[Span], zeros: Tensor, read: Callable[[Span, Tensor], Tensor]) -> Tensor:
        """The sum over all parameters, the same bits in every process of any number; see :meth:`Shard.sum`."""
        blocks = self._blocks(self.rank)
        sums = BlockSums(self._together(zeros))
        block, total = blocks.start, zeros
        for span in spans:
            for part in cut(span, [bound - self.first for bound in self._bounds[block + 1 : blocks.stop + 1]]):
                total = read(part, total)
                if self.first + part.first + part.num_params == self._bounds[block + 1]:
                    sums.add(block, total)
                    block, total = block + 1, zeros
        return self._added(sums).to(zeros.device)

    def sum_vector(self, vector: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of what ``term`` says of each block of the vector ``[P]``, of which this process has its own."""
        sums = BlockSums(1)
        for block in self._blocks(self.rank):
            sums.add(block, term(vector[self._bounds[block] - self.first : self._bounds[block + 1] - self.first]))
        return self._added(sums).to(vector.device)

    def sum_parts(self, part: Tensor) -> Tensor:
        """The sum over the ranks, in order."""
        return in_order(list(self._gathered(part))).to(part.device)

    def gather(self, vector: Tensor) -> Tensor:
        """All parameters ``[P]`` from the parts of all ranks, such as ``result.params``, on every rank."""
        ranges = self._ranges()
        longest = max(part.stop - part.start for part in ranges)
        padded = torch.nn.functional.pad(vector.detach(), (0, longest - len(vector)))
        parts = self._gathered(padded)
        whole = [values[: part.stop - part.start] for values, part in zip(parts, ranges, strict=True)]
        return torch.cat(whole).to(vector.device)

    def deal(self, vectors: Tensor) -> Tensor:
        """The parameters of this rank of vectors ``[m, P]`` that the ranks have, ``[M, len(self)]``.

        Ranks may have different numbers ``m``, 0 too, of which ``M`` is the sum, in the order of the ranks.
        """
        counts = self._gathered(torch.tensor([len(vectors)])).flatten().tolist()
        sent = [vectors[:, part].reshape(-1) for part in self._ranges()]
        result = torch.empty(sum(counts), len(self), dtype=vectors.dtype, device=self._device)
        with self._waiting():
            dist.all_to_all_single(
                _bytes(result),
                _bytes(torch.cat(sent).to(self._device)),
                [count * len(self) * vectors.element_size() for count in counts],
                [part.numel() * vectors.element_size() for part in sent],
                group=self._group,
            )
        return result.to(vectors.device)

    def own(self, vector: Tensor) -> Tensor:
        """This process's parameters of a vector ``[P]``; a view."""
        return vector[self.params]

    def agreed(self, take_in: Callable[[], ClientUpdates], *, stored: bool, **settings: object) -> ClientUpdates:
        """The round that all ranks have taken in alike.

        Args:
            take_in: Gives this rank's part of the round. What it raises, all ranks raise.
            stored: Whether it comes from a store, which may have other clients than those of other ranks.
            settings: What must be the same on all ranks.

        Raises:
            ValueError: the ranks' calls differ.
            RuntimeError: a rank did not get here.
        """
        try:
            clients = take_in()
            if clients.tiles.num_params != len(self):
                raise ValueError(f"expected the parameters of {self!r}, got {clients.tiles.num_params}")
            settings |= {"num_params": self.num_params, "source": "a store" if stored else "tensors"}
            settings |= {"dtypes": sorted(map(str, clients.tiles.dtypes)), "fishers": clients.tiles.with_fishers}
            if not stored:
                settings |= {"client_ids": clients.clients, "num_samples": clients.num_samples.tolist()}
            part = RoundPart.of(clients, {name: str(value) for name, value in settings.items()})
        except Exception as error:
            self.exchanged(RoundPart(error=f"{type(error).__name__}: {error}"))
            raise
        parts = self.exchanged(part)
        for rank, other in enumerate(parts):
            if other.error is not None:
                raise ValueError(f"rank {rank} of {self.world} cannot aggregate: {other.error}")
        for name in part.settings:
            values = [other.settings[name] for other in parts]
            if len({*values}) > 1:
                differ = ", ".join(f"rank {rank} has {shown(v, str)}" for rank, v in enumerate(values))
                raise ValueError(f"the ranks were called with different {name}: {differ}")
        return joined(clients, parts, self, self.num_params)

    def confirm(self, weights: Tensor) -> None:
        """Raise RuntimeError unless all ranks came to the same weights: different processors may round differently."""
        digest = hashlib.sha256(weights.cpu().numpy().tobytes()).digest()
        digests = self._gathered(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        if not (digests == digests[0]).all():
            raise RuntimeError("the ranks came to different decisions: do they remember the same of earlier rounds?")

    def _ranges(self) -> list[slice]:
        return [shard_range(self.num_params, rank, self.world) for rank in range(self.world)]

    def _blocks(self, rank: int) -> range:
        return range(*(first_block(self._bounds, r, self.world) for r in (rank, rank + 1)))

    def _together(self, total: Tensor) -> int:
        """Over how many blocks sums of this size are added before they are sent: a power of two."""
        apart = max(1, _SUMS_BYTES // max(1, total.numel() * total.element_size()))
        together = math.ceil((len(self._bounds) - 1) / apart)
        return 1 << (together - 1).bit_length()

    def _added(self, sums: BlockSums) -> Tensor:
        """The sum over all blocks of all ranks."""
        plans = [self._plan(rank, sums.together) for rank in range(self.world)]
        stacked = torch.stack([node.total for node in sums.nodes])
        room = max(len(plan) for plan in plans) - len(stacked)
        padded = torch.cat([stacked, stacked.new_zeros(room, *stacked.shape[1:])])
        everything = BlockSums(sums.together)
        for plan, totals in zip(plans, self._one_by_one(padded), strict=True):
            for (block, size), total in zip(plan, totals, strict=False):  # of the shorter plans the rest is padding
                everything.add(block, total, size)
        return in_order([node.total for node in everything.nodes])

    def _one_by_one(self, values: Tensor) -> Iterator[Tensor]:
        """The values of the ranks in order; together only where that takes little memory."""
        if self.world * values.numel() * values.element_size() <= 4 * _SUMS_BYTES:
            yield from self._gathered(values)
            return
        values = values.to(self._device)
        for rank in range(self.world):
            part = values if rank == self.rank else torch.empty_like(values)
            with self._waiting():
                dist.broadcast(part, group=self._group, group_src=rank)
            yield part

    def _plan(self, rank: int, together: int) -> list[tuple[int, int]]:
        """The blocks whose sums a rank will send, each sum by its first block and its number of blocks."""
        sums = BlockSums(together)
        for block in self._blocks(rank):
            sums.add(block, torch.empty(0))
        return [(node.block, node.size) for node in sums.nodes]

    def _gathered(self, values: Tensor) -> Tensor:
        """``[world, *shape]`` from the ranks' ``[*shape]``, on the device of the collectives."""
        result = torch.empty(self.world, *values.shape, dtype=values.dtype, device=self._device)
        if result.numel():
            parts = [_bytes(part) for part in result]
            with self._waiting():
                dist.all_gather(parts, _bytes(values.to(self._device)), group=self._group)
        return result

    def exchanged(self, value: T) -> list[T]:
        """What every rank has, such as a number; it is pickled, and small."""
        result: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(result, value, group=self._group)
        return result

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world} cannot go on: another rank died, or did not get here within the "
                f"timeout of the group ({error})"
            ) from error


def _bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor, a view if it is contiguous: backends do not know all dtypes."""
    return values.reshape(-1).view(torch.uint8)
