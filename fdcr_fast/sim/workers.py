"""The clients of a round in worker processes, which fill the rows of a shared store themselves."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

import torch
from torch import Tensor, nn

from fdcr_fast import UpdateStore
from fdcr_fast.server.row_writer import RowWriter
from fdcr_fast.server.rows import Accepted
from fdcr_fast.server.shared_memory import SharedTensor
from fdcr_fast.sim.clients import LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.execution import Clients, Job, Outcome, describe
from fdcr_fast.sim.metrics import Phase, Stopwatch
from fdcr_fast.sim.training import Worker

AHEAD = 2  # jobs that a worker is given at a time, so that it need not wait for the next one

# Processes are forked from one that has imported all that a run imports on its way (4 s), and has used none of it.
IMPORTED_ONCE = ["fdcr_fast.sim.study.pool", "fdcr_fast.sim.figures", "sklearn.datasets", "torch._dynamo"]


@dataclass(frozen=True)
class _Order:
    """A job, and what else its worker must know: which round, and whether one came before."""

    job: Job
    round: int
    has_last_update: bool


@dataclass(frozen=True)
class _Reply:
    """What became of an order: the filled row, why its client is rejected, or why there is no upload."""

    seconds: dict[Phase, float]
    accepted: Accepted | None = None
    rejected: str | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Supplies:
    """What every worker is given when it starts.

    Attributes:
        vectors: Shared ``[2, P]``: global parameters as sent out, and what the last round changed in them.
    """

    config: SimulationConfig
    clients: Clients
    build: Callable[[], nn.Module]
    writer: RowWriter
    vectors: SharedTensor


@dataclass(eq=False)
class _Process:
    process: ForkServerProcess
    connection: Connection
    ready: bool = False
    orders: deque[_Order] = field(default_factory=deque)


class WorkerPool:
    """An :class:`fdcr_fast.sim.execution.Executor` of several processes of this machine, started when needed.

    Data, global parameters and store are shared; only jobs and statistics go to and fro. A worker that dies takes the
    client with it that it was training, and is replaced. A script that uses it must do so under
    ``if __name__ == "__main__"``, as worker processes import the script.

    Args:
        config: Of the run; each of its ``workers`` has ``threads`` threads per operator.
        clients: With shared data.
        build: Makes the model; a function that other processes can import.
        store: A shared one, the only one that :meth:`run` is called with.
    """

    def __init__(
        self, config: SimulationConfig, clients: Clients, build: Callable[[], nn.Module], store: UpdateStore
    ) -> None:
        self._vectors = SharedTensor((2, store.num_params), torch.float32)
        self._supplies = _Supplies(config, clients, build, store.writer(), self._vectors)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED_ONCE)
        self._workers: list[_Process] = []

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """See :class:`fdcr_fast.sim.execution.Executor`."""
        params, last_update = self._vectors.tensor
        params.copy_(work.params)
        if work.last_update is not None:
            last_update.copy_(work.last_update)
        waiting = deque(_Order(job, work.round, work.last_update is not None) for job in jobs)
        try:
            while waiting or any(worker.orders for worker in self._workers):
                self._workers += [self._start() for _ in range(self._supplies.config.workers - len(self._workers))]
                for worker in self._workers:
                    while worker.ready and waiting and len(worker.orders) < AHEAD:
                        worker.orders.append(waiting.popleft())
                        worker.connection.send(worker.orders[-1])
                ready = wait([worker.connection for worker in self._workers])
                for worker in [each for each in self._workers if each.connection in ready]:
                    try:
                        reply = worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        yield self._bury(worker, waiting)
                        continue
                    if worker.ready:
                        yield _outcome(worker.orders.popleft().job, reply, work.clock, store)
                    worker.ready = True
        finally:
            if any(worker.orders for worker in self._workers):  # nobody waits for their replies any more
                self.close()

    def close(self) -> None:
        """End the processes; the next run starts new ones."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self) -> _Process:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._supplies, there), daemon=True)
        process.start()
        there.close()
        return _Process(process, here)

    def _bury(self, worker: _Process, waiting: deque[_Order]) -> Outcome:
        """Take a worker out that has died; what it had not begun is done by others."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        code = worker.process.exitcode
        if not worker.orders:
            raise RuntimeError(f"a worker process ended with exit code {code} before it had anything to do")
        lost, *others = worker.orders
        waiting.extendleft(reversed(others))
        return Outcome(lost.job, f"failed: its worker process ended with exit code {code} (killed? out of memory?)")


def _outcome(job: Job, reply: _Reply, clock: Stopwatch, store: UpdateStore) -> Outcome:
    for phase, seconds in reply.seconds.items():
        clock.seconds[phase] += seconds
    if reply.accepted is not None:
        store.admit(reply.accepted)
    if reply.rejected is not None:
        store.reject(job.client, reply.rejected)
    return Outcome(job, reply.error)


def _work(supplies: _Supplies, connection: Connection) -> None:
    """What a process does until its pool closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the pool ends its processes itself
    torch.set_num_threads(supplies.config.threads)
    worker = Worker(supplies.build())
    params, last_update = supplies.vectors.tensor
    try:
        connection.send(None)
        while True:
            order = connection.recv()
            connection.send(_perform(supplies, order, worker, params, last_update if order.has_last_update else None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def _perform(supplies: _Supplies, order: _Order, worker: Worker, params: Tensor, last_update: Tensor | None) -> _Reply:
    clock = Stopwatch()
    job, work = order.job, LocalWork(supplies.config, worker, clock, order.round, params, last_update)
    try:
        upload = supplies.clients.perform(work, job)
    except Exception as error:
        return _Reply(clock.seconds, error=describe(error))
    try:
        with clock.phase("aggregation"):
            accepted = supplies.writer.fill(job.row, job.client, *upload)
    except ValueError as error:
        return _Reply(clock.seconds, rejected=str(error))
    return _Reply(clock.seconds, accepted=accepted)
