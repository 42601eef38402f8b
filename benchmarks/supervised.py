"""Jobs in a process of their own, which may crash or hang: the others are done all the same."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

_MARK = "RESULT "  # of lines with results, among whatever libraries print


def report(result: dict[str, Any]) -> None:
    """Tells the parent process the result of the next job."""
    print(_MARK + json.dumps(result), flush=True)


def results(command: Callable[[int], Sequence[str]], jobs: int, limit: float) -> Iterator[dict[str, Any]]:
    """The result of every job in turn; ``{"failure": why}`` of one that ended its process, or took too long.

    Args:
        command: From the number of a job to the command of a process that reports its result and those of the jobs
            after it. It may end early: another process goes on.
        jobs: Number of jobs.
        limit: Seconds that one job may take, with the start of a process.
    """
    done = 0
    while done < jobs:
        before = done
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command(done), stdout=subprocess.PIPE, stderr=said, text=True)
            try:
                for result in _reported(process, limit):
                    yield result
                    done += 1
                failure = _ending(process, said)
            except queue.Empty:
                failure = f"took longer than {limit:g} s"
            finally:
                process.kill()
                process.wait()
        if done == before or (done < jobs and process.returncode != 0):
            yield {"failure": failure}
            done += 1


def _reported(process: subprocess.Popen[str], limit: float) -> Iterator[dict[str, Any]]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get(timeout=limit)) is not None:
        yield json.loads(line.removeprefix(_MARK))


def _ending(process: subprocess.Popen[str], said: IO[str]) -> str:
    code = process.wait()
    said.seek(0)
    last = (said.read().strip().splitlines() or [""])[-1]
    return f"the process ended with exit status {code}: {last}"
