"""Federated simulator: clients, attackers and a server in one process. Needs the extra ``fdcr_fast[sim]``."""

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord, Summary
from fdcr_fast.sim.run.result import ProgressEvent, SimulationResult
from fdcr_fast.sim.run.simulation import resume, simulate

__all__ = [
    "ClientRecord",
    "ProgressEvent",
    "RoundRecord",
    "SimulationConfig",
    "SimulationResult",
    "Summary",
    "resume",
    "simulate",
]
