"""Weights & Biases; needs the extra ``fdcr_fast[wandb]``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import wandb

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.loggers.scalars import scalars
from fdcr_fast.sim.run.callbacks import Callback, FinishedRound
from fdcr_fast.sim.run.result import SimulationResult


class WandbLogger(Callback):
    """Sends settings and every round's figures to Weights & Biases, or writes them for later where it is offline.

    ``WANDB_MODE``, ``WANDB_PROJECT`` and the like are as usual. A resumed run is the same run there, by its folder.

    Args:
        project: Name of the project; by default that of the environment.
    """

    def __init__(self, project: str | None = None) -> None:
        self.project = project

    def on_start(self, config: SimulationConfig, folder: Path | None, finished: int) -> None:
        """Begin the run, or go on with it."""
        known = None if folder is None else hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=self.project,
            id=known,
            resume="allow",
            dir=None if folder is None else str(folder),
            config=config.model_dump(mode="json"),
        )

    def on_round(self, round: FinishedRound) -> None:
        """Log the figures of a round."""
        self._run.log(scalars(round.record), step=round.record.round)

    def on_end(self, result: SimulationResult) -> None:
        """Log the summary, and end the run."""
        figures = result.summary.model_dump(mode="json")
        self._run.summary.update({f"summary/{name}": value for name, value in figures.items() if value is not None})
        self._run.finish()
