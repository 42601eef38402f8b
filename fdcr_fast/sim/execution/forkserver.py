"""Where the simulator's processes come from: forked from one that has imported all that a run imports on its way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

# By name, as most of these import this module. It takes 4 s. The server process uses none of them.
IMPORTED_ONCE = ["fdcr_fast.sim.study.pool", "fdcr_fast.sim.run.figures", "sklearn.datasets", "torch._dynamo"]

# Every batch of a large model allocates and frees hundreds of megabytes. By default the C library gives them back to
# the system each time, which clears them again page by page: 6 % of the time of a ResNet-18, 8 % of an LSTM's. Programs
# read this when they begin.
_TUNABLES = "GLIBC_TUNABLES"
_MALLOC = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={64 << 20}:glibc.malloc.trim_threshold={512 << 20}"


def forkserver_context() -> ForkServerContext:
    """A context that starts processes quickly; there is one such server for all that this process starts.

    Ctrl-C goes to the whole group of processes. The server ignores it, also while it imports: who started the processes
    ends them. Only the main thread can arrange that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with malloc_in_huge_pages(), _ctrl_c_ignored():
        forkserver.ensure_running()
    return context


@contextmanager
def malloc_in_huge_pages() -> Iterator[None]:
    """What a new program reads in the block; settings of the user's own, which come last, count."""
    before = os.environ.get(_TUNABLES)
    os.environ[_TUNABLES] = _MALLOC if not before else f"{_MALLOC}:{before}"
    try:
        yield
    finally:
        del os.environ[_TUNABLES]
        if before is not None:
            os.environ[_TUNABLES] = before


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """As a new process inherits it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
