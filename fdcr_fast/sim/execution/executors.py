"""Which executor a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Population
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.contract import Executor
from fdcr_fast.sim.execution.in_process import InProcess
from fdcr_fast.sim.execution.stacked import Stacked
from fdcr_fast.sim.execution.worker_pool import WorkerPool


class Setup(NamedTuple):
    """What an executor can be made of.

    Attributes:
        config: Configuration of the run.
        population: All clients.
        build: Makes the model; a function that other processes can import.
        store: The only one that the executor will be given, shared where there are worker processes.
    """

    config: SimulationConfig
    population: Population
    build: Callable[[], nn.Module]
    store: UpdateStore


class Way(NamedTuple):
    """One row of the table: which configurations ask for an executor, and how it is made."""

    wanted: Callable[[SimulationConfig], bool]
    make: Callable[[Setup], Executor]


WAYS = (
    Way(lambda config: config.with_workers, lambda own: WorkerPool(own.config, own.population, own.build, own.store)),
    Way(
        lambda config: config.stacked,
        lambda own: Stacked(own.population, own.build(), own.config.device, own.config.stack),
    ),
    Way(lambda config: True, lambda own: InProcess(own.population)),
)


def executor_of(setup: Setup) -> Executor:
    """The executor of the first row that the configuration asks for.

    Raises:
        ValueError: the device cannot be used here.
    """
    return next(way.make(setup) for way in WAYS if way.wanted(setup.config))
