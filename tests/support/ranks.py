"""Processes of torch.distributed on this machine, started once, in which tests run functions."""

import os
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fdcr_fast.sim.execution.forkserver import forkserver_context

_TIMEOUT = 400  # of a call that should hang for none of the reasons that tests look at


def _serve(rank, world, store, timeout, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    groups = {size: dist.new_group(range(size), timeout=timedelta(seconds=timeout)) for size in range(1, world + 1)}
    while True:
        try:
            size, function, arguments = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            pipe.send((True, function(groups[size], *arguments)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, (type(error).__name__, str(error))))


class Ranks:
    """Three ranks; in which tests run functions of a group of the first one, two or three of them."""

    def __init__(self, context, store, world, timeout):
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, size, function, *arguments):
        for rank in range(size):
            own = [x[rank] if isinstance(x, PerRank) else x for x in arguments]
            self.pipes[rank].send((size, function, own))

    def result(self, rank):
        """``(True, value)`` or ``(False, (type, message))``."""
        assert self.pipes[rank].poll(_TIMEOUT), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def call(self, size, function, *arguments):
        self.start(size, function, *arguments)
        results = [self.result(rank) for rank in range(size)]
        assert all(good for good, _ in results), results
        return [value for _, value in results]

    def errors(self, size, function, *arguments):
        self.start(size, function, *arguments)
        results = [self.result(rank) for rank in range(size)]
        assert not any(good for good, _ in results), results
        return [error for _, error in results]


class PerRank(list):
    """An argument that is another one on every rank."""


@contextmanager
def started(folder, world=3, timeout=300):
    context = forkserver_context()
    ranks = Ranks(context, os.fspath(folder / "ranks"), world, timeout)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
