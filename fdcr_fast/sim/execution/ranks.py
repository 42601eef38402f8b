"""The processes that run one simulation together: this one alone, or ranks such as torchrun starts them.

Every rank keeps some of the parameters of all clients. The first one measures and writes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from fdcr_fast import ParamShard, UpdateStore
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shard import WHOLE, Shard
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.sim.clients.population import Population
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.across_ranks import AcrossRanks
from fdcr_fast.sim.execution.contract import Executor
from fdcr_fast.sim.execution.executors import executor_of
from fdcr_fast.sim.training.classifier import Architecture

_TIMEOUT = "FDCR_FAST_TIMEOUT"
_PATIENCE = 1800.0  # seconds
_AT_A_TIME = 4  # clients that a rank trains before ranks send each other their parameters

T = TypeVar("T")


@contextmanager
def torchrun_group() -> Iterator[dist.ProcessGroup | None]:
    """The processes that torchrun has started, this being one of them; None if it was not started so.

    One waits for the others for ``FDCR_FAST_TIMEOUT`` seconds, by default half an hour: longer than it takes to train a
    few clients.

    Raises:
        ValueError: the variable is not a positive number.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    text = os.environ.get(_TIMEOUT, str(_PATIENCE))
    try:
        timeout = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise ValueError(f"{_TIMEOUT} must be a positive number of seconds, got {text!r}")
    dist.init_process_group("gloo", timeout=timeout)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Processes(ABC):
    """The processes that run a simulation together.

    Attributes:
        shard: The parameters that this one keeps of all clients.
        first: Whether this one measures and writes.
    """

    shard: Shard
    first: bool

    @abstractmethod
    def start(
        self, config: SimulationConfig, population: Population, build: Architecture, num_params: int
    ) -> tuple[UpdateStore, Executor]:
        """The store of a round, which has this process's parameters, and the executor that fills it."""

    @abstractmethod
    def aggregate(self, rule: AggregationRule, params: Tensor, store: UpdateStore) -> AggregationResult:
        """What the rule makes of a round, given the global parameters ``[P]``; the model stays if it can use nobody."""

    @abstractmethod
    def uploads(self, store: UpdateStore) -> ClientUpdates:
        """What the store of a round holds, as all processes agree on it."""

    @abstractmethod
    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all processes; what it raises, all raise."""


class Alone(Processes):
    """This process alone."""

    shard = WHOLE
    first = True

    def start(
        self, config: SimulationConfig, population: Population, build: Architecture, num_params: int
    ) -> tuple[UpdateStore, Executor]:
        """One store, which the executor fills itself."""
        store = UpdateStore(
            num_params, config.cohort(), with_fishers=population.with_fishers, shared=config.with_workers
        )
        return store, executor_of(config, population, build, store)

    def aggregate(self, rule: AggregationRule, params: Tensor, store: UpdateStore) -> AggregationResult:
        """The rule's result."""
        return rule.aggregate(params, store, on_empty="keep")

    def uploads(self, store: UpdateStore) -> ClientUpdates:
        """What the store holds."""
        return store.client_updates()

    def from_first(self, make: Callable[[], T]) -> T:
        """What this process makes."""
        return make()


class Ranks(Processes):
    """The processes of a group, each with a shard of the parameters.

    Raises:
        ValueError: there are fewer parameters than processes.
    """

    shard: ParamShard

    def __init__(self, num_params: int, group: dist.ProcessGroup) -> None:
        self.shard = ParamShard(num_params, group)
        self.first = self.shard.rank == 0

    def start(
        self, config: SimulationConfig, population: Population, build: Architecture, num_params: int
    ) -> tuple[UpdateStore, Executor]:
        """A store of this rank's parameters; whole uploads lie in an outbox until they have been dealt out."""
        fishers = population.with_fishers
        store = UpdateStore(len(self.shard), config.cohort(), with_fishers=fishers)
        size = max(_AT_A_TIME * config.workers, config.stack)
        outbox = UpdateStore(num_params, size, with_fishers=fishers, shared=config.with_workers)
        own = replace(population, buffers=population.buffers.for_clients(size))
        inner = executor_of(config, own, build, outbox)
        return store, AcrossRanks(self.shard, population.buffers, inner, outbox, own.buffers)

    def aggregate(self, rule: AggregationRule, params: Tensor, store: UpdateStore) -> AggregationResult:
        """The rule's result, with this rank's parameters."""
        return rule.aggregate(self.shard.own(params), store, on_empty="keep", shard=self.shard)

    def uploads(self, store: UpdateStore) -> ClientUpdates:
        """What the stores of all ranks hold."""
        return self.shard.agreed(store.client_updates, stored=True)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, sent to all."""
        made: list[T | Exception] = []
        if self.first:
            try:
                made.append(make())
            except Exception as error:
                made.append(error)
        (value,) = self.shard.exchanged(made)[0]
        if isinstance(value, Exception):
            raise value
        return value
