"""Where the clients of a round are run: what every way of doing so promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Job
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.imports import one_line


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: The job.
        error: Why there is no upload; None where the store was given one, which it took or rejected.
    """

    job: Job
    error: str | None = None


class Executor(Protocol):
    """Runs the clients of a round: here, in processes of this machine, or on several machines.

    Whatever it is, the result is the same to the last bit, as what a client does depends on its arguments alone (see
    :meth:`fdcr_fast.sim.clients.population.Population.perform`) and uploads lie in the rows of their jobs.
    """

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform all jobs and yield one outcome for each, as soon as it is known and in any order.

        When the iterator is exhausted, the store (of this process, where there are several) holds the upload of every
        job under ``client_id=job.client`` in ``row=job.row``, except for those that it has rejected and those with an
        error. An exception in one client's work is its outcome's error and nothing else happens; errors of the executor
        itself are raised. Uploads go into the store as they come and are held nowhere else. The time that clients take
        is added to ``work.clock``.

        Args:
            work: The round's work; its classifier may be used.
            jobs: They are of distinct clients and rows, which are free.
            store: Where uploads go. Nobody else changes it meanwhile.
        """

    def close(self) -> None:
        """End processes and the like; afterwards it cannot be used."""


def describe(error: Exception) -> str:
    """An exception in one line, as a reason why a client has failed."""
    return f"failed: {one_line(error)}"
