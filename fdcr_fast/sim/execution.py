"""Where the clients of a round are run: what every way of doing so promises, and the plain one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from fdcr_fast import UpdateStore
from fdcr_fast.sim.attackers import Attackers
from fdcr_fast.sim.clients import ClientShares, LocalWork


@dataclass(frozen=True)
class Job:
    """One client's work in a round.

    Attributes:
        row: Of the store, where its upload goes.
        client: Its id.
        epochs: How many it trains.
        attackers: How many clients attack in this round, it being one of them; 0 for one that does not.
    """

    row: int
    client: int
    epochs: int
    attackers: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: Which one.
        error: Why there is no upload; None where the store was given one, which it took or rejected.
    """

    job: Job
    error: str | None = None


class Upload(NamedTuple):
    """What a client sends: ``delta_k [P]``, ``F_k [P]`` (or None) and ``n_k``."""

    update: Tensor
    fisher: Tensor | None
    num_samples: int


@dataclass(frozen=True, eq=False)
class Clients:
    """Everybody's data, the attackers among them, and whether they compute Fishers."""

    data: ClientShares
    attackers: Attackers
    with_fishers: bool = True

    def perform(self, work: LocalWork, job: Job) -> Upload:
        """Train one client and compute its Fisher; depends on the arguments alone."""
        data = self.data[job.client]
        if job.attackers:
            update, fisher = self.attackers.draft(work, job.client, job.epochs, job.attackers, self.with_fishers)
        else:
            params = work.train(job.client, data, epochs=job.epochs)
            update, fisher = params - work.params, work.fisher(data, params) if self.with_fishers else None
        return Upload(update, fisher, len(data.rows))


class Executor(Protocol):
    """Runs the clients of a round: here, in processes of this machine, or on several machines.

    Whatever it is, the result is the same to the last bit, as :meth:`Clients.perform` depends on its arguments alone
    and uploads lie in the rows of their jobs.
    """

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform all jobs and yield one outcome for each, as soon as it is known and in any order.

        When the iterator is exhausted, the store (of this process, where there are several) holds the upload of every
        job under ``client_id=job.client`` in ``row=job.row``, except for those that it has rejected and those with an
        error. An exception in one client's work is its outcome's error and nothing else happens; errors of the executor
        itself are raised. Uploads go into the store as they come and are held nowhere else. The time that clients take
        is added to ``work.clock``.

        Args:
            work: Of this round; its worker may be used.
            jobs: Distinct clients and rows, which are free.
            store: Where uploads go. Nobody else changes it meanwhile.
        """

    def close(self) -> None:
        """End processes and the like; afterwards it cannot be used."""


@dataclass(frozen=True, eq=False)
class InProcess:
    """One client after the other, in this process."""

    clients: Clients

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """See :class:`Executor`."""
        for job in jobs:
            try:
                upload = self.clients.perform(work, job)
            except Exception as error:
                yield Outcome(job, describe(error))
                continue
            with work.clock.phase("aggregation"):
                store.put(*upload, client_id=job.client, row=job.row)
            yield Outcome(job)

    def close(self) -> None:
        """Nothing to end."""


def describe(error: Exception) -> str:
    """An exception in one line, as a reason why a client has failed."""
    return f"failed: {type(error).__name__}: {error}".partition("\n")[0]
