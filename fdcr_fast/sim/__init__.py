"""Federated simulator: clients, attackers and a server in one process. Needs the extra ``fdcr_fast[sim]``."""

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.federation import ProgressEvent, SimulationResult, resume, simulate
from fdcr_fast.sim.metrics import ClientRecord, RoundRecord, Summary

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
