"""Where the simulator's processes come from: forked from one that has imported all that a run imports on its way."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

# By name, as most of these import this module. It takes 4 s. The server process uses none of them.
IMPORTED_ONCE = ["fdcr_fast.sim.study.pool", "fdcr_fast.sim.run.figures", "sklearn.datasets", "torch._dynamo"]


def forkserver_context() -> ForkServerContext:
    """A context that starts processes quickly; there is one such server for all that this process starts.

    Ctrl-C goes to the whole group of processes. The server ignores it, also while it imports: who started the processes
    ends them. Only the main thread can arrange that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a new process inherits it
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context
