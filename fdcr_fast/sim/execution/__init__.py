"""Where the clients of a round are run: in this process, in several, as one batched model, on several machines."""

from fdcr_fast.sim.clients.population import Job
from fdcr_fast.sim.execution.contract import Executor, Outcome
from fdcr_fast.sim.execution.in_process import InProcess

__all__ = ["Executor", "InProcess", "Job", "Outcome"]
