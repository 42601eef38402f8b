"""MLflow; needs the extra ``fdcr_fast[mlflow]``."""

from __future__ import annotations

import time
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.loggers.scalars import scalars
from fdcr_fast.sim.run.callbacks import Callback, FinishedRound
from fdcr_fast.sim.run.result import SimulationResult

_FOLDER = "fdcr_fast.folder"  # tag by which the run of a folder is found again


class MLflowLogger(Callback):
    """Sends settings and every round's figures to MLflow, where ``MLFLOW_TRACKING_URI`` says.

    A resumed run is the same run there, known by its folder.

    Args:
        experiment: Name of the experiment, which is created if there is none.
    """

    def __init__(self, experiment: str = "fdcr_fast") -> None:
        self.experiment = experiment

    def on_start(self, config: SimulationConfig, folder: Path | None, finished: int) -> None:
        """Begin the run, or go on with it."""
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(self.experiment)
        known = self._client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        place = "" if folder is None else str(folder.resolve())
        begun = self._client.search_runs([known], f"tags.`{_FOLDER}` = '{place}'") if finished else []
        if begun:
            self._id = begun[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(known, tags={_FOLDER: place}).info.run_id
        params = [Param(name, str(value)) for name, value in config.model_dump(mode="json").items()]
        self._client.log_batch(self._id, params=params)

    def on_round(self, round: FinishedRound) -> None:
        """Log the figures of a round."""
        number = round.record.round
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, number) for name, value in scalars(round.record).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def on_end(self, result: SimulationResult) -> None:
        """End the run."""
        self._client.set_terminated(self._id)
