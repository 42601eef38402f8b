"""What becomes of one client in a round: its work, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fdcr_fast.sim.clients.attackers import Attackers
from fdcr_fast.sim.clients.buffers import RoundBuffers
from fdcr_fast.sim.clients.data import ClientData
from fdcr_fast.sim.clients.work import LocalWork


@dataclass(frozen=True)
class Job:
    """One client's work in a round.

    Attributes:
        row: Place of the upload in the store.
        client: The client's id.
        epochs: Number of epochs, or of steps, that it trains.
        attackers: Number of clients who attack in this round, it being one of them; 0 for one that does not.
    """

    row: int
    client: int
    epochs: int
    attackers: int = 0


class Upload(NamedTuple):
    """What a client sends: ``delta_k [P]``, ``F_k [P]`` (or None) and ``n_k``."""

    update: Tensor
    fisher: Tensor | None
    num_samples: int


@dataclass(frozen=True, eq=False)
class Population:
    """All clients of a federation.

    Attributes:
        data: What each of them has.
        attackers: The malicious ones.
        with_fishers: Whether they compute Fishers.
        buffers: Those of the round's models.
    """

    data: ClientData
    attackers: Attackers
    with_fishers: bool = True
    buffers: RoundBuffers = field(default_factory=RoundBuffers)

    def perform(self, work: LocalWork, job: Job) -> Upload:
        """Train one client and compute its Fisher; depends on the arguments, and on the buffers sent out, alone.

        Its buffers go into its row.
        """
        samples = self.data[job.client]
        buffers = self.buffers.sent.clone()
        if job.attackers:
            update, fisher = self.attackers.draft(
                work, job.client, job.epochs, job.attackers, self.with_fishers, buffers
            )
        else:
            params = work.train(job.client, samples, epochs=job.epochs, buffers=buffers)
            update, fisher = params - work.params, work.fisher(samples, params, buffers) if self.with_fishers else None
        self.buffers.put(job.row, buffers)
        return Upload(update, fisher, len(samples.indices))
