"""The public names of :mod:`fdcr_fast.sim`."""

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.federated import FederatedData
from fdcr_fast.sim.run.callbacks import Callback, FinishedRound, PartError
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord, Summary
from fdcr_fast.sim.run.result import ProgressEvent, SimulationResult
from fdcr_fast.sim.run.simulation import resume, simulate

__all__ = [
    "Callback",
    "ClientRecord",
    "FederatedData",
    "FinishedRound",
    "PartError",
    "ProgressEvent",
    "RoundRecord",
    "SimulationConfig",
    "SimulationResult",
    "Summary",
    "resume",
    "simulate",
]
