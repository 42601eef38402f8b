"""Which executor a configuration asks for."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.buffers import RoundBuffers
from fdcr_fast.sim.clients.population import Population
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.contract import Executor
from fdcr_fast.sim.execution.in_process import InProcess
from fdcr_fast.sim.execution.stacked import Stacked
from fdcr_fast.sim.execution.worker_pool import WorkerPool
from fdcr_fast.sim.training.classifier import Architecture


def executor_of(config: SimulationConfig, population: Population, build: Architecture, store: UpdateStore) -> Executor:
    """The executor that a configuration asks for.

    Args:
        config: Configuration of the run.
        population: All clients.
        build: Makes the model, of what other processes can import where there are worker processes.
        store: The only one that the executor will be given, shared where there are worker processes.

    Raises:
        ValueError: the device cannot be used here, the model cannot be stacked, or worker processes cannot import what
            is the user's.
    """
    if config.with_workers:
        check_sendable(population.attackers.stages, population.attackers.poisoning, build)
        return WorkerPool(config, population, build, store)
    if config.stacked:
        check_stackable(build, population.buffers)
        return Stacked(population, build(), config.device, config.stack, build.precision)
    return InProcess(population)


def check_stackable(build: Architecture, buffers: RoundBuffers) -> None:
    """Raise ValueError for what clients cannot train as one batched model with."""
    own = {"a loss": build.loss, "an optimizer": build.optimizer}
    found = [name for name, value in own.items() if value is not None]
    found += ["buffers"] if buffers.layout.numel else []
    if found:
        raise ValueError(
            f"stack, device: clients with {', '.join(found)} of their own cannot train as one batched model"
        )


def check_sendable(*parts: object) -> None:
    """Raise ValueError for what cannot be sent to worker processes, such as a model that a lambda makes."""
    try:
        ForkingPickler.dumps(parts)
    except Exception as error:  # whatever an object makes of being pickled
        raise ValueError(
            f"workers: worker processes import what is given in Python, so it stands at the top of a module: {error}"
        ) from error
