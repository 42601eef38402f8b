"""A simulation over several processes of ``torch.distributed``, on one machine or many, such as torchrun starts them.

Every rank trains a part of the clients and keeps a part of the parameters of all of them. Rank 0 measures and writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fdcr_fast import ParamShard, UpdateStore
from fdcr_fast.sim.clients import LocalWork
from fdcr_fast.sim.execution import Executor, Job, Outcome

_TIMEOUT = "FDCR_FAST_TIMEOUT"
_PATIENCE = 1800.0  # seconds

T = TypeVar("T")


@contextmanager
def torchrun_group() -> Iterator[dist.ProcessGroup | None]:
    """The processes that torchrun has started, this being one of them; None if it was not started so.

    One waits for the others for ``FDCR_FAST_TIMEOUT`` seconds, by default half an hour: longer than it takes to train a
    few clients.

    Raises:
        ValueError: the variable is not a positive number.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    text = os.environ.get(_TIMEOUT, str(_PATIENCE))
    try:
        timeout = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise ValueError(f"{_TIMEOUT} must be a positive number of seconds, got {text!r}")
    dist.init_process_group("gloo", timeout=timeout)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def on_first_rank(shard: ParamShard | None, make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks; what it raises, all raise."""
    if shard is None:
        return make()
    made: list[T | Exception] = []
    if shard.rank == 0:
        try:
            made.append(make())
        except Exception as error:
            made.append(error)
    (value,) = shard.exchanged(made)[0]
    if isinstance(value, Exception):
        raise value
    return value


@dataclass(frozen=True)
class _Parcel:
    """What a rank tells the others about a job that it has performed.

    Attributes:
        num_samples: Of the upload that comes with it; None if there is none.
        rejected: Why the upload cannot be used.
    """

    outcome: Outcome
    num_samples: float | None = None
    rejected: str | None = None


@dataclass(frozen=True, eq=False)
class AcrossRanks:
    """An :class:`fdcr_fast.sim.execution.Executor` that deals jobs out to ranks, and uploads by parameters.

    Each rank performs every world-th job, as many at a time as its outbox holds, and then all ranks send each other
    their parameters of these uploads. So a rank holds its share of the round and one outbox.

    Attributes:
        shard: Of this rank, whose parameters the store of a round holds.
        inner: Performs the jobs of this rank.
        outbox: Where it puts their uploads, whole.
    """

    shard: ParamShard
    inner: Executor
    outbox: UpdateStore

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """See :class:`fdcr_fast.sim.execution.Executor`; outcomes of all ranks' jobs come on every rank."""
        of_all = [jobs[rank :: self.shard.world] for rank in range(self.shard.world)]
        size = self.outbox.capacity
        for first in range(0, len(of_all[0]), size):  # the first rank has the most
            self.outbox.clear()
            batch = of_all[self.shard.rank][first : first + size]
            performed = self.inner.run(work, [replace(job, row=row) for row, job in enumerate(batch)], self.outbox)
            errors = {outcome.job.client: outcome.error for outcome in performed}
            with work.clock.phase("aggregation"):
                yield from self._deal([self._parcel(Outcome(job, errors[job.client])) for job in batch], store)

    def close(self) -> None:
        """End what the inner executor has started."""
        self.inner.close()

    def _parcel(self, outcome: Outcome) -> _Parcel:
        client = outcome.job.client
        if outcome.error is not None:
            return _Parcel(outcome)
        if client in self.outbox.rejected:
            return _Parcel(outcome, rejected=self.outbox.rejected[client])
        return _Parcel(outcome, num_samples=self.outbox[client].num_samples)

    def _deal(self, own: Sequence[_Parcel], store: UpdateStore) -> list[Outcome]:
        """Send every rank its parameters of this rank's uploads, and put into the store what comes from all."""
        uploads = [self.outbox[parcel.outcome.job.client] for parcel in own if parcel.num_samples is not None]
        vectors = [vector for upload in uploads for vector in (upload.update, upload.fisher) if vector is not None]
        whole = torch.stack(vectors) if vectors else torch.empty(0, self.outbox.num_params, dtype=store.dtype)
        dealt = iter(self.shard.deal(whole))
        outcomes = []
        for parcel in itertools.chain.from_iterable(self.shard.exchanged(own)):
            job = parcel.outcome.job
            if parcel.num_samples is not None:
                update, fisher = next(dealt), next(dealt) if store.with_fishers else None
                store.put(update, fisher, parcel.num_samples, client_id=job.client, row=job.row)
            elif parcel.rejected is not None:
                store.reject(job.client, parcel.rejected)
            outcomes.append(parcel.outcome)
        return outcomes
