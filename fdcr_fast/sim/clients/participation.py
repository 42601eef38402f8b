"""Who takes part in a round and how far they get, drawn by the seed; takes time for those who do alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.seeding import derive_seed, numpy_generator

DROPPED_OUT = "dropped out: sent nothing"
MISSED_DEADLINE = "missed the deadline: sent nothing"


@dataclass(frozen=True)
class Participants:
    """The clients drawn for one round.

    Attributes:
        clients: All of them, ascending.
        epochs: Local epochs, or steps, by client, of those who will send something.
        missing: Why the others will not.
    """

    clients: tuple[int, ...]
    epochs: Mapping[int, int]
    missing: Mapping[int, str]

    def without(self, failed: Mapping[int, str]) -> Participants:
        """These participants, of whom some have failed, too."""
        epochs = {client: epochs for client, epochs in self.epochs.items() if client not in failed}
        return Participants(self.clients, epochs, {**self.missing, **failed})


def draw_participants(config: SimulationConfig, round: int) -> Participants:
    """Draw ``config.cohort()`` clients without replacement, and what becomes of each by itself.

    A client drops out with probability ``dropout``. Otherwise it is a straggler with probability ``stragglers``: when
    time is up it has done ``e`` of its ``E`` epochs, or steps, ``e`` uniform in ``0..E-1``, and sends the model that
    it has by then, or nothing where ``e = 0`` (Li et al. 2020, "Federated Optimization in Heterogeneous
    Networks", where ``e >= 1``).
    """
    drawn: Sequence[int] = range(config.clients)
    if config.cohort() < config.clients:
        drawn = sorted(random.Random(derive_seed(config.seed, "participants", round)).sample(drawn, config.cohort()))
    epochs, missing = {}, {}
    for client in drawn:
        done = config.local_passes
        if config.dropout or config.stragglers:
            generator = numpy_generator(config.seed, "participation", round, client)
            drops_out, straggles = generator.random(2) < (config.dropout, config.stragglers)
            if drops_out:
                missing[client] = DROPPED_OUT
                continue
            if straggles:
                done = int(generator.integers(config.local_passes))
        if done:
            epochs[client] = done
        else:
            missing[client] = MISSED_DEADLINE
    return Participants(tuple(drawn), epochs, missing)
