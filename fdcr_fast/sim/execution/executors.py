"""Which executor a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Population
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.contract import Executor
from fdcr_fast.sim.execution.in_process import InProcess
from fdcr_fast.sim.execution.stacked import Stacked
from fdcr_fast.sim.execution.worker_pool import WorkerPool


def executor_of(
    config: SimulationConfig, population: Population, build: Callable[[], nn.Module], store: UpdateStore
) -> Executor:
    """The executor that a configuration asks for.

    Args:
        config: Configuration of the run.
        population: All clients.
        build: Makes the model; a function that other processes can import.
        store: The only one that the executor will be given, shared where there are worker processes.

    Raises:
        ValueError: the device cannot be used here.
    """
    if config.with_workers:
        return WorkerPool(config, population, build, store)
    if config.stacked:
        return Stacked(population, build(), config.device, config.stack)
    return InProcess(population)
