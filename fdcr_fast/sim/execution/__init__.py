"""Where the clients of a round are run: in this process, in several, as one batched model, on several machines."""

from fdcr_fast.sim.execution.contract import Executor, Outcome

__all__ = ["Executor", "Outcome"]
