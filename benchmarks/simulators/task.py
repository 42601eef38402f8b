"""What every simulator runs: FedAvg of one of these models, one epoch of SGD per client, on data from a file.

A contender is a script ``NAME.py DATA ROUNDS THREADS CLIENTS PRECISION``, which prints one line of JSON as its last:
its version, and the seconds of each round after the first, in which a tenth of the clients start whatever has to be
started.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.text import lstm

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-5
FULL, MIXED = "32-true", "bf16-mixed"  # names that ours and PyTorch Lightning have
ARGUMENTS = sys.argv[1:]


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: Of the data.
        samples: Of each client.
        model: Its name in the simulator.
        rounds: Timed ones of a process, and how many processes of every contender take turns.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    clients: int
    samples: int
    batch: int
    lr: float
    model: str
    rounds: tuple[int, int]


TASKS = {
    "cnn": Task("Fashion-MNIST", (1, 28, 28), 10, 200, 50, 64, 0.01, "cnn", (4, 2)),
    "resnet18": Task("noise of CIFAR-10's shape", (3, 32, 32), 10, 20, 100, 32, 0.01, "resnet18", (1, 2)),
    "lstm": Task("80 random bytes, of which the next is told", (80,), 256, 20, 20, 10, 0.1, "lstm", (4, 3)),
}


@cache
def current(path: str) -> Task:
    with np.load(path) as arrays:
        return TASKS[str(arrays["task"])]


def load(path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs ``[K, n, *shape]`` and labels ``[K, n]``, of the clients that take part."""
    with np.load(path or ARGUMENTS[0]) as arrays:
        count = None if path else int(ARGUMENTS[3])
        return arrays["images"][:count], arrays["labels"][:count]


def rounds() -> int:
    return int(ARGUMENTS[1])


def in_round(number: int) -> int:
    """How many clients take part in a round, counted from 0."""
    count = int(ARGUMENTS[3])
    return count if number else max(2, count // 10)


def use_threads() -> None:
    torch.set_num_threads(int(ARGUMENTS[2]))


def model(path: str | None = None) -> nn.Module:
    task = current(path or ARGUMENTS[0])
    return build_model(
        (lambda known: lstm(**known)) if task.model == "lstm" else task.model, task.shape, task.classes, 0
    )


def sgd(network: nn.Module, path: str | None = None) -> torch.optim.SGD:
    task = current(path or ARGUMENTS[0])
    return torch.optim.SGD(network.parameters(), lr=task.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def autocast(precision: str | None = None) -> torch.autocast:
    """A context for losses; within it nothing changes where the precision is float32's."""
    return torch.autocast("cpu", torch.bfloat16, enabled=(precision or ARGUMENTS[4]) == MIXED)


class Laps:
    """Seconds between calls, without the first ones, in which everything is started."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.calls = 0
        self._last: float | None = None

    def __call__(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        self.calls += 1


def report(version: str, seconds: list[float]) -> None:
    print("\n" + json.dumps({"version": version, "seconds": seconds}), flush=True)


def time_rounds(version: str, one_round: Callable[[int], object]) -> None:
    """Time rounds of so many clients."""
    one_round(in_round(0))
    laps = Laps()
    laps()
    for number in range(1, rounds() + 1):
        one_round(in_round(number))
        laps()
    report(version, laps.seconds)
