"""Runs of a study side by side, in processes that they share one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from fdcr_fast.sim.costs import begin_peak_rss
from fdcr_fast.sim.execution.forkserver import forkserver_context
from fdcr_fast.sim.execution.process_state import process_state_kept
from fdcr_fast.sim.execution.worker_pool import kept_workers
from fdcr_fast.sim.run.result import ProgressEvent
from fdcr_fast.sim.study.folder import StudyRunFolder
from fdcr_fast.sim.study.spec import Run


@dataclass(frozen=True)
class StudyEvent:
    """Sent when a run starts (``progress`` is None), goes on, and has ended, well or not.

    Attributes:
        run: The run it is about.
        progress: What the simulation reports; None at start and end.
        ended: Whether it has finished or failed.
        error: Why it failed.
    """

    run: Run
    progress: ProgressEvent | None = None
    ended: bool = False
    error: str | None = None


StudyProgress = Callable[[StudyEvent], None]


def pending(runs: Sequence[Run], runs_folder: Path) -> list[Run]:
    """The runs without a result, each once: those that failed are tried again."""
    distinct = {run.folder: run for run in runs}
    return [run for name, run in distinct.items() if not StudyRunFolder(runs_folder / name).finished]


@dataclass(eq=False)
class _Process:
    """A process that executes one run after the other."""

    process: ForkServerProcess
    connection: Connection


def execute(
    runs: Sequence[Run], runs_folder: Path, workers: int | None = None, progress: StudyProgress | None = None
) -> None:
    """Execute all runs that have no result yet, ``workers`` at a time (by default as many as the cores suffice for).

    As many processes take one run after the other, and keep those in which runs with ``workers`` train their clients.
    One that crashes takes no other run with it and is replaced; a run's peak memory is its own. Results do not depend
    on ``workers`` or on the order in which runs end. After a kill at any moment the same call goes on: finished runs
    are skipped, others resume from their last round.

    A script must call this under ``if __name__ == "__main__"``, as its processes import the script.
    """
    context = forkserver_context()
    waiting = pending(runs, runs_folder)[::-1]
    most = workers or at_a_time(waiting)
    idle: list[_Process] = []
    running: dict[Connection, tuple[Run, _Process]] = {}

    def tell(event: StudyEvent) -> None:
        if progress is not None:
            progress(event)

    def end(run: Run, exit_code: int | None = None) -> None:
        tell(StudyEvent(run, ended=True, error=_outcome(runs_folder / run.folder, exit_code)))

    try:
        while waiting or running:
            while waiting and len(running) < most:
                run, worker = waiting.pop(), idle.pop() if idle else _start(context)
                running[worker.connection] = run, worker
                worker.connection.send((run.config, runs_folder / run.folder))
                tell(StudyEvent(run))
            ready = wait(list(running))
            for connection in [each for each in running if each in ready]:
                run, worker = running[connection]
                try:
                    event = connection.recv()
                except (EOFError, ConnectionResetError):
                    del running[connection]
                    worker.process.join()
                    end(run, worker.process.exitcode)
                    continue
                if event is not None:
                    tell(StudyEvent(run, event))
                else:
                    del running[connection]
                    idle.append(worker)
                    end(run)
    finally:
        for worker in idle:
            worker.connection.close()  # which ends it
        for _, worker in running.values():
            worker.process.terminate()
        for worker in [*idle, *(worker for _, worker in running.values())]:
            worker.process.join()


def at_a_time(runs: Sequence[Run]) -> int:
    """How many runs the cores suffice for, each with as many processes as it says."""
    return max(1, (os.cpu_count() or 1) // max((run.config.workers for run in runs), default=1))


def _start(context: ForkServerContext) -> _Process:
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,))
    process.start()
    there.close()
    return _Process(process, here)


def _outcome(path: Path, exit_code: int | None) -> str | None:
    folder = StudyRunFolder(path)
    if not folder.finished and folder.error is None:
        folder.fail(f"the process ended with exit code {exit_code} and no message (killed? out of memory?)")
    return folder.error


def _work(connection: Connection) -> None:
    """What a process does until the study closes the connection: execute runs and report their progress."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the study ends its processes itself
    try:
        with kept_workers():
            while True:
                config, path = connection.recv()
                begin_peak_rss()
                with process_state_kept(), torch.random.fork_rng(devices=[]):  # as in processes of their own
                    StudyRunFolder(path).execute(config, connection.send)
                connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
