"""Running a federation from its first round or from a checkpoint to its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.run.folder import RunFolder
from fdcr_fast.sim.run.metrics import summarize
from fdcr_fast.sim.run.result import Progress, ProgressEvent, RunState, SimulationResult


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
) -> SimulationResult:
    """Run a federated simulation. The same configuration gives the same bits on the same machine.

    Args:
        config: What to run.
        out: New folder for config.yaml, rounds.csv, clients.csv, summary.json, figures and checkpoint, and for
            scores.csv and ranks.csv where rules look on.
        progress: Called after every client and every round.
        group: Processes that all call this and run it together, the first of which measures and writes; None for this
            one alone. docs/distributed.md tells which bits do not depend on how many they are.

    Raises:
        FileNotFoundError: the data set's files are not there.
        FileExistsError: ``out`` already holds a run.
        ValueError: the configuration does not fit the data, or the server cannot run in several processes.
        RuntimeError: another process of the group died or did not arrive in time.
    """
    with num_threads(config.threads), closing(Federation(config, group)) as federation:
        folder = None if out is None else RunFolder(Path(out))
        if folder is not None:
            federation.processes.from_first(partial(folder.create, config))
        return _run(federation, RunState(federation.initial_params, [], []), folder, progress)


def resume(out: str | Path, progress: Progress | None = None, group: ProcessGroup | None = None) -> SimulationResult:
    """Continue the run in ``out`` as its config.yaml says, to the result of an uninterrupted run.

    All processes of a group must see the folder; see :func:`simulate`.

    Raises:
        FileNotFoundError: the folder holds no run, or the data set's files are not there.
        ValueError: the folder's files do not fit together.
    """
    folder = RunFolder(Path(out))
    config = folder.config()
    with num_threads(config.threads), closing(Federation(config, group)) as federation:
        state = folder.load() or RunState(federation.initial_params, [], [])
        if state.memory:
            federation.rule = federation.rule.with_memory(state.memory)
        federation.watch.remember(state.watched)
        return _run(federation, state, folder, progress)


def _run(
    federation: Federation, state: RunState, folder: RunFolder | None, progress: Progress | None
) -> SimulationResult:
    config = federation.config
    if not federation.processes.first:
        folder = progress = None
    for number in range(len(state.rounds) + 1, config.rounds + 1):
        before = state.params
        state.params, record, clients = federation.run_round(number, before, progress, state.last_update)
        state.last_update = state.params - before
        state.rounds.append(record)
        state.clients.extend(clients)
        state.memory = federation.rule.memory()
        state.scores.extend(federation.watch.scores)
        state.ranks.extend(federation.watch.ranks)
        state.watched = federation.watch.memories()
        state.similarity = federation.similarity
        if folder is not None:
            folder.save(state, clients, federation.watch.scores, federation.watch.ranks)
        if progress is not None:
            progress(ProgressEvent(number, config.cohort(), record))
    result = state.result(config, summarize(state.rounds))
    if folder is not None:
        from fdcr_fast.sim.run.figures import write_figures  # matplotlib, which runs without a folder need not import

        write_figures(result, folder.path)
    seconds = result.summary.seconds + federation.clock.lap()
    result = replace(result, summary=result.summary.model_copy(update={"seconds": seconds}))
    if folder is not None:
        folder.finish(result.summary)
    return result
