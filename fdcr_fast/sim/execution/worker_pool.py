"""The clients of a round in worker processes, which fill the rows of a shared store themselves."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple

import torch

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Job, Population
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.costs import Phase, Stopwatch
from fdcr_fast.sim.execution.contract import Outcome, describe
from fdcr_fast.sim.execution.forkserver import forkserver_context
from fdcr_fast.sim.execution.process_state import process_state_kept
from fdcr_fast.sim.training.classifier import Architecture
from fdcr_fast.store.row_writer import RowWriter
from fdcr_fast.store.rows import Accepted
from fdcr_fast.store.shared_memory import SharedTensor

AHEAD = 2  # orders that a worker is given at a time, so that it need not wait for the next one
SECONDS_OF_AN_ORDER = 0.02  # an order takes a tenth of a millisecond on its way to and fro


@dataclass(frozen=True)
class _Order:
    """Jobs, and what else their worker must know: which round, and whether one came before."""

    jobs: tuple[Job, ...]
    round: int
    has_last_update: bool


class _Result(NamedTuple):
    """What became of a job: the filled row, why its client is rejected, or why there is no upload."""

    accepted: Accepted | None = None
    rejected: str | None = None
    error: str | None = None


class _Reply(NamedTuple):
    """What became of an order's jobs."""

    seconds: dict[Phase, float]
    results: list[_Result]


@dataclass(frozen=True, eq=False)
class _Supplies:
    """What every worker of a pool is given.

    Attributes:
        vectors: Global parameters as sent out, and what the last round changed in them, in shared memory, ``[2, P]``.
    """

    config: SimulationConfig
    population: Population
    build: Architecture
    writer: RowWriter
    vectors: SharedTensor


@dataclass(eq=False)
class _Process:
    """A worker as its pool sees it; another pool may have had it before.

    Attributes:
        begun: Number of jobs that it has begun, in shared memory, ``[1]``.
        done: Number of jobs that it has told the pool of.
    """

    process: ForkServerProcess
    connection: Connection
    begun: SharedTensor
    done: int = 0
    ready: bool = False
    orders: deque[_Order] = field(default_factory=deque)

    def release(self) -> bool:
        """Take the supplies back, unless it is at work or has died."""
        if not self.ready or self.orders:
            return False
        try:
            self.connection.send(None)
        except OSError:
            return False
        return True


_kept: list[_Process] | None = None  # those that pools have left; None where nobody keeps them


@contextmanager
def kept_workers() -> Iterator[None]:
    """In the block, workers of pools that have been closed serve in the next ones."""
    global _kept
    _kept = []
    try:
        yield
    finally:
        workers, _kept = _kept, None
        _end(workers)


class WorkerPool:
    """An :class:`fdcr_fast.sim.execution.Executor` of several processes of this machine, started when needed.

    Data, global parameters and store are shared; only jobs and statistics go to and fro. A worker that dies takes the
    client with it that it was training, and is replaced. A script that uses it must do so under
    ``if __name__ == "__main__"``, as worker processes import the script.

    Args:
        config: Configuration of the run; each of its ``workers`` has ``threads`` threads per operator.
        population: All clients, with shared data.
        build: Makes the model, of what other processes can import.
        store: A shared one, the only one that :meth:`run` is called with.
    """

    def __init__(
        self, config: SimulationConfig, population: Population, build: Architecture, store: UpdateStore
    ) -> None:
        self._vectors = SharedTensor((2, store.num_params), torch.float32)
        self._supplies = _Supplies(config, population, build, store.writer(), self._vectors)
        self._context = forkserver_context()
        self._workers: list[_Process] = []
        self._seconds_of_a_job = SECONDS_OF_AN_ORDER

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform the jobs; see :class:`fdcr_fast.sim.execution.Executor`."""
        params, last_update = self._vectors.tensor
        params.copy_(work.params)
        if work.last_update is not None:
            last_update.copy_(work.last_update)
        waiting = deque(jobs)
        try:
            while waiting or any(worker.orders for worker in self._workers):
                self._workers += [self._start() for _ in range(self._supplies.config.workers - len(self._workers))]
                for worker in self._workers:
                    while worker.ready and waiting and len(worker.orders) < AHEAD:
                        worker.orders.append(_Order(self._next(waiting), work.round, work.last_update is not None))
                        worker.connection.send(worker.orders[-1])
                ready = wait([worker.connection for worker in self._workers])
                for worker in [each for each in self._workers if each.connection in ready]:
                    try:
                        reply = worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        yield self._bury(worker, waiting)
                        continue
                    if worker.ready:
                        yield from self._outcomes(worker, reply, work.clock, store)
                    worker.ready = True
        finally:
            if any(worker.orders for worker in self._workers):  # nobody waits for their replies any more
                self.close()

    def close(self) -> None:
        """Give up the processes; the next run starts new ones."""
        workers, self._workers = self._workers, []
        if _kept is not None:
            _kept.extend(worker for worker in workers if worker.release())
        _end([worker for worker in workers if _kept is None or worker not in _kept])

    def _start(self) -> _Process:
        worker = _kept.pop() if _kept else self._new()
        worker.ready = False
        worker.connection.send(self._supplies)
        return worker

    def _new(self) -> _Process:
        here, there = self._context.Pipe()
        begun = SharedTensor((1,), torch.int64)
        process = self._context.Process(target=_work, args=(begun, there), daemon=True)
        process.start()
        there.close()
        return _Process(process, here, begun)

    def _next(self, waiting: deque[Job]) -> tuple[Job, ...]:
        """Jobs for an order: short, and towards the end few, so that all workers end together."""
        left = len(waiting) // (2 * len(self._workers))
        count = max(1, min(int(SECONDS_OF_AN_ORDER / self._seconds_of_a_job), left))
        return tuple(waiting.popleft() for _ in range(count))

    def _outcomes(self, worker: _Process, reply: _Reply, clock: Stopwatch, store: UpdateStore) -> Iterator[Outcome]:
        order = worker.orders.popleft()
        worker.done += len(order.jobs)
        self._seconds_of_a_job = max(sum(reply.seconds.values()) / len(order.jobs), 1e-9)
        for phase, seconds in reply.seconds.items():
            clock.seconds[phase] += seconds
        for job, result in zip(order.jobs, reply.results, strict=True):
            if result.accepted is not None:
                store.admit(result.accepted)
            if result.rejected is not None:
                store.reject(job.client, result.rejected)
            yield Outcome(job, result.error)

    def _bury(self, worker: _Process, waiting: deque[Job]) -> Outcome:
        """Take a worker out that has died. Only the client that it was at is lost: others do what it had not begun, and
        again what it had not told of.
        """
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        code = worker.process.exitcode
        if not worker.orders:
            raise RuntimeError(f"a worker process ended with exit code {code} before it had anything to do")
        jobs = [job for order in worker.orders for job in order.jobs]
        lost = jobs.pop(max(int(worker.begun.tensor) - worker.done - 1, 0))
        waiting.extendleft(reversed(jobs))
        return Outcome(lost, f"failed: its worker process ended with exit code {code} (killed? out of memory?)")


def _end(workers: Sequence[_Process]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join()
        worker.connection.close()


def _work(begun: SharedTensor, connection: Connection) -> None:
    """What a process does until its connection is closed: get ready for a pool, perform its orders, and so on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the pool ends its processes itself
    try:
        while True:
            with process_state_kept():
                _serve(connection.recv(), begun, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def _serve(supplies: _Supplies, begun: SharedTensor, connection: Connection) -> None:
    """Perform the orders of one pool until it sends None."""
    torch.set_num_threads(supplies.config.threads)
    classifier = supplies.build.classifier()
    params, last_update = supplies.vectors.tensor
    connection.send(None)
    for order in iter(connection.recv, None):
        clock = Stopwatch()
        given = last_update if order.has_last_update else None
        work = LocalWork(supplies.config, classifier, clock, order.round, params, given)
        results = []
        for job in order.jobs:
            begun.tensor.add_(1)
            results.append(_perform(supplies, work, job))
        connection.send(_Reply(clock.seconds, results))


def _perform(supplies: _Supplies, work: LocalWork, job: Job) -> _Result:
    try:
        upload = supplies.population.perform(work, job)
    except Exception as error:
        return _Result(error=describe(error))
    try:
        with work.clock.phase("aggregation"):
            return _Result(accepted=supplies.writer.fill(job.row, job.client, *upload))
    except ValueError as error:
        return _Result(rejected=str(error))
