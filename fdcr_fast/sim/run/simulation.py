"""Running a federation from its first round or from a checkpoint to its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.federated import FederatedData
from fdcr_fast.sim.parts import Given, Parts, named
from fdcr_fast.sim.run.callbacks import Callback, Callbacks, FinishedRound, named_callbacks
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.run.folder import RunFolder
from fdcr_fast.sim.run.metrics import summarize
from fdcr_fast.sim.run.result import Progress, ProgressEvent, RunState, SimulationResult
from fdcr_fast.sim.training.autograd import Loss, OptimizerFactory


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """So many threads per operator in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def simulate(
    config: SimulationConfig,
    out: str | Path | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
    *,
    model: Callable[..., nn.Module] | None = None,
    data: FederatedData | Callable[..., FederatedData] | None = None,
    rule: AggregationRule | type[AggregationRule] | None = None,
    attack: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    callbacks: Sequence[Callback] = (),
) -> SimulationResult:
    """Run a federated simulation. The same configuration gives the same bits on the same machine.

    What is given as an object stands instead of what the configuration names, whose settings it replaces: config.yaml
    has its import path, ``package.module:name``, so that the run can be resumed. Objects that cannot be imported again,
    such as lambdas, are named ``given:TYPE`` and must be given to :func:`resume`, too.

    Args:
        config: What to run.
        out: New folder for config.yaml, rounds.csv, clients.csv, summary.json, figures and checkpoint, and for
            scores.csv and ranks.csv where rules look on.
        progress: Called after every client and every round.
        group: Processes that all call this and run it together, the first of which measures and writes; None for this
            one alone. docs/distributed.md tells which bits do not depend on how many they are.
        model: Returns the clients' model, any module of float32 that maps inputs ``[N, ...]`` to ``[N, classes]``; its
            arguments ``image_shape`` and ``num_classes``, if it has such, are those of the data. Parameters that do not
            require gradients are not trained and not sent. What it draws initially follows the seed.
        data: The data, or a function that returns them.
        rule: The server's rule: a class, or an object, of which each run makes its own. Fields of a dataclass that are
            at their defaults are what a server knows, as for a name.
        attack: What malicious clients do: an object with one or more hooks, see
            :meth:`fdcr_fast.sim.attacks.stages.Stages.of`, or a class of such.
        loss: Losses ``[N]`` of outputs ``[N, classes]`` and labels ``[N]``, in training, where their mean counts, and
            in the Fisher.
        optimizer: Returns the optimizer of parameters and a learning rate, such as ``torch.optim.Adam``; a new one for
            every client in every round.
        callbacks: What is told of every round, such as loggers.

    Raises:
        FileNotFoundError: the data set's files are not there.
        FileExistsError: ``out`` already holds a run.
        TypeError: an object is not what it is given as.
        ValueError: the configuration or an object does not fit the data, or the server cannot run in several processes.
        RuntimeError: another process of the group died or did not arrive in time; as :class:`fdcr_fast.sim.PartError`,
            a rule or a callback of the user's has failed, or all clients of a round have.
    """
    given = Given(model, data, rule, attack, loss, optimizer)
    parts = Parts.of(config, given)
    config = named(config, given)
    told = Callbacks(named_callbacks(config), callbacks)
    with num_threads(config.threads), closing(Federation(config, group, parts)) as federation:
        folder = None if out is None else RunFolder(Path(out))
        if folder is not None:
            federation.processes.from_first(partial(folder.create, config))
        return _run(federation, RunState(federation.initial_params, [], []), folder, progress, told)


def resume(
    out: str | Path,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
    *,
    model: Callable[..., nn.Module] | None = None,
    data: FederatedData | Callable[..., FederatedData] | None = None,
    rule: AggregationRule | type[AggregationRule] | None = None,
    attack: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    callbacks: Sequence[Callback] = (),
) -> SimulationResult:
    """Continue the run in ``out`` as its config.yaml says, to the result of an uninterrupted run.

    Import paths in it are imported and called: resume no folder of somebody whose code you would not run. All processes
    of a group must see the folder; see :func:`simulate`, also for what must be given again.

    Raises:
        FileNotFoundError: the folder holds no run, or the data set's files are not there.
        TypeError: an object is not what it is given as.
        ValueError: the folder's files do not fit together, or what is given is not what the run was begun with.
        RuntimeError: see :func:`simulate`.
    """
    folder = RunFolder(Path(out))
    config = folder.config()
    given = Given(model, data, rule, attack, loss, optimizer)
    for setting, value in named(config, given):
        if value != getattr(config, setting):
            raise ValueError(f"{setting}: the run in {out} was begun with {getattr(config, setting)}, got {value}")
    parts = Parts.of(config, given)
    told = Callbacks(named_callbacks(config), callbacks)
    with num_threads(config.threads), closing(Federation(config, group, parts)) as federation:
        state = folder.load()
        if state is None:
            state = RunState(federation.initial_params, [], [])
        else:
            _check_model(state, federation.initial_params, federation.buffers, folder.checkpoint_path)
        if state.memory:
            federation.rule = federation.rule.with_memory(state.memory)
        if state.buffers is not None:
            federation.buffers = state.buffers
        federation.watch.remember(state.watched)
        return _run(federation, state, folder, progress, told)


def _check_model(state: RunState, params: Tensor, buffers: Tensor, path: Path) -> None:
    """Raise ValueError if a checkpoint is not of a model of these parameters ``[P]`` and buffers ``[B]``."""
    update = params if state.last_update is None else state.last_update
    found = len(state.params), len(update), 0 if state.buffers is None else len(state.buffers)
    if found != (len(params), len(params), len(buffers)):
        raise ValueError(
            f"{path} is of a model of {found[0]} parameters and {found[2]} numbers in buffers, the run's has "
            f"{len(params)} and {len(buffers)}: has its code changed?"
        )


def _run(
    federation: Federation,
    state: RunState,
    folder: RunFolder | None,
    progress: Progress | None,
    told: Callbacks,
) -> SimulationResult:
    config = federation.config
    if not federation.processes.first:
        folder, progress, told = None, None, Callbacks()
    path = None if folder is None else folder.path
    told.tell("on_start", config, path, len(state.rounds))
    for number in range(len(state.rounds) + 1, config.rounds + 1):
        before = state.params
        state.params, record, clients = federation.run_round(number, before, progress, state.last_update)
        state.last_update = state.params - before
        state.buffers = federation.buffers
        state.rounds.append(record)
        state.clients.extend(clients)
        state.memory = federation.memory()
        state.scores.extend(federation.watch.scores)
        state.ranks.extend(federation.watch.ranks)
        state.watched = federation.watch.memories()
        state.similarity = federation.similarity
        model = partial(federation.classifier.state, state.params, state.buffers)
        if folder is not None:
            if config.save_every and number % config.save_every == 0:
                folder.save_model(number, model())
            folder.save(state, clients, federation.watch.scores, federation.watch.ranks)
        if progress is not None:
            progress(ProgressEvent(number, config.cohort(), record))
        told.tell("on_round", FinishedRound(record, clients, model))
    result = state.result(config, summarize(state.rounds))
    if folder is not None:
        from fdcr_fast.sim.run.figures import write_figures  # matplotlib, which runs without a folder need not import

        write_figures(result, folder.path)
    seconds = result.summary.seconds + federation.clock.lap()
    result = replace(result, summary=result.summary.model_copy(update={"seconds": seconds}))
    if folder is not None:
        folder.finish(result.summary)
    told.tell("on_end", result)
    return result
