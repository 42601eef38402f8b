"""TensorBoard; needs the extra ``fdcr_fast[tensorboard]``."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.loggers.scalars import scalars
from fdcr_fast.sim.run.callbacks import Callback, FinishedRound
from fdcr_fast.sim.run.result import SimulationResult


class TensorBoardLogger(Callback):
    """Writes every round's figures for TensorBoard.

    Args:
        path: Folder of the log; by default ``tensorboard`` in the folder of the run, or in ``runs`` without one.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path

    def on_start(self, config: SimulationConfig, folder: Path | None, finished: int) -> None:
        """Open the log, where a resumed run goes on after its last finished round, and write down the settings."""
        path = self.path or (Path("runs") if folder is None else folder) / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=finished + 1 if finished else None)
        self._writer.add_text("config", f"    {config.to_yaml()}".replace("\n", "\n    "))

    def on_round(self, round: FinishedRound) -> None:
        """Write the figures of a round."""
        for name, value in scalars(round.record).items():
            self._writer.add_scalar(name, value, round.record.round)
        self._writer.flush()

    def on_end(self, result: SimulationResult) -> None:
        """Close the log."""
        self._writer.close()
