"""The clients of a round one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Job, Population
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.execution.contract import Outcome, describe


@dataclass(frozen=True, eq=False)
class InProcess:
    """One client after the other, in this process."""

    population: Population

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform the jobs; see :class:`fdcr_fast.sim.execution.Executor`."""
        for job in jobs:
            try:
                upload = self.population.perform(work, job)
            except Exception as error:
                yield Outcome(job, describe(error))
                continue
            with work.clock.phase("aggregation"):
                store.put(*upload, client_id=job.client, row=job.row)
            yield Outcome(job)

    def close(self) -> None:
        """End nothing, as nothing runs elsewhere."""
