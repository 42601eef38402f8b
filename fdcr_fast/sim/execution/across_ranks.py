"""The clients of a round dealt out to several processes of ``torch.distributed``, on one machine or many.

Every rank trains some of the clients and keeps some of the parameters of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdcr_fast import ParamShard, UpdateStore
from fdcr_fast.sim.clients.buffers import RoundBuffers
from fdcr_fast.sim.clients.population import Job
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.execution.contract import Executor, Outcome
from fdcr_fast.sim.training.base import NO_BUFFERS


@dataclass(frozen=True)
class _Parcel:
    """What a rank tells the others about a job that it has performed.

    Attributes:
        num_samples: Sample count of the upload that comes with it; None if there is none.
        rejected: Why the upload cannot be used.
        buffers: The buffers that come with it, ``[B]``.
    """

    outcome: Outcome
    num_samples: float | None = None
    rejected: str | None = None
    buffers: Tensor = NO_BUFFERS


@dataclass(frozen=True, eq=False)
class AcrossRanks:
    """An :class:`fdcr_fast.sim.execution.Executor` that deals jobs out to ranks, and uploads by parameters.

    Each rank performs every world-th job, as many at a time as its outbox holds, and then all ranks send each other
    their parameters of these uploads, and all buffers. So a rank holds its part of the round, one outbox, and the
    buffers of all clients.

    Attributes:
        shard: Parameters of this rank, which the store of a round holds.
        buffers: Buffers of the models of a round, the same on all ranks.
        inner: Performs the jobs of this rank.
        outbox: Where it puts their uploads, whole.
        outbox_buffers: And where the buffers that come with these.
    """

    shard: ParamShard
    buffers: RoundBuffers
    inner: Executor
    outbox: UpdateStore
    outbox_buffers: RoundBuffers

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform the jobs of all ranks, whose outcomes come on every one; see
        :class:`fdcr_fast.sim.execution.Executor`."""
        of_all = [jobs[rank :: self.shard.world] for rank in range(self.shard.world)]
        size = self.outbox.capacity
        self.outbox_buffers.sent.copy_(self.buffers.sent)
        for first in range(0, len(of_all[0]), size):  # the first rank has the most
            self.outbox.clear()
            batch = of_all[self.shard.rank][first : first + size]
            performed = self.inner.run(work, [replace(job, row=row) for row, job in enumerate(batch)], self.outbox)
            errors = {outcome.job.client: outcome.error for outcome in performed}
            with work.clock.phase("aggregation"):
                parcels = [self._parcel(row, Outcome(job, errors[job.client])) for row, job in enumerate(batch)]
                yield from self._deal(parcels, store)

    def close(self) -> None:
        """End what the inner executor has started."""
        self.inner.close()

    def _parcel(self, row: int, outcome: Outcome) -> _Parcel:
        client = outcome.job.client
        if outcome.error is not None:
            return _Parcel(outcome)
        if client in self.outbox.rejected:
            return _Parcel(outcome, rejected=self.outbox.rejected[client])
        return _Parcel(outcome, num_samples=self.outbox[client].num_samples, buffers=self.outbox_buffers[row])

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
                self.buffers.put(job.row, parcel.buffers)
            elif parcel.rejected is not None:
                store.reject(job.client, parcel.rejected)
            outcomes.append(parcel.outcome)
        return outcomes
