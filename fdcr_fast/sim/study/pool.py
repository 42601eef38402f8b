"""Runs of a study side by side, each in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution.forkserver import forkserver_context
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


def execute(
    runs: Sequence[Run], runs_folder: Path, workers: int | None = None, progress: StudyProgress | None = None
) -> None:
    """Execute all runs that have no result yet, ``workers`` at a time (as many as there are cores).

    Every run has a process of its own, so that one that crashes takes no other with it, and its peak memory is its
    own. Results do not depend on ``workers`` or on the order in which runs end. After a kill at any moment the same
    call goes on: finished runs are skipped, others resume from their last round.

    A script must call this under ``if __name__ == "__main__"``, as its processes import the script.
    """
    context = forkserver_context()
    waiting = pending(runs, runs_folder)[::-1]
    running: dict[Connection, tuple[Run, ForkServerProcess]] = {}

    def tell(event: StudyEvent) -> None:
        if progress is not None:
            progress(event)

    try:
        while waiting or running:
            while waiting and len(running) < (workers or os.cpu_count() or 1):
                run = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(run.config, runs_folder / run.folder, sender))
                process.start()
                sender.close()
                running[receiver] = run, process
                tell(StudyEvent(run))
            ready = wait(list(running))
            for receiver in [each for each in running if each in ready]:
                run, process = running[receiver]
                try:
                    tell(StudyEvent(run, receiver.recv()))
                except EOFError:
                    del running[receiver]
                    process.join()
                    tell(StudyEvent(run, ended=True, error=_outcome(runs_folder / run.folder, process.exitcode)))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _outcome(path: Path, exit_code: int | None) -> str | None:
    folder = StudyRunFolder(path)
    if not folder.finished and folder.error is None:
        folder.fail(f"the process ended with exit code {exit_code} and no message (killed? out of memory?)")
    return folder.error


def _work(config: SimulationConfig, path: Path, sender: Connection) -> None:
    """What a process does: execute one run and report its progress."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the study ends its processes itself
    StudyRunFolder(path).execute(config, sender.send)
