"""What every simulator runs: FedAvg of the paper's CNN, one epoch of SGD per client, on data from a file.

A contender is a script ``NAME.py DATA ROUNDS THREADS``, which prints one line of JSON as its last: its version, and the
seconds of each round after the first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fdcr_fast.sim.training.models import build_model

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.01, 0.9, 1e-5
ARGUMENTS = sys.argv[1:]


def load(path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[K, n, 1, 28, 28]`` and labels ``[K, n]``."""
    with np.load(path or ARGUMENTS[0]) as arrays:
        return arrays["images"], arrays["labels"]


def rounds() -> int:
    return int(ARGUMENTS[1])


def use_threads() -> None:
    torch.set_num_threads(int(ARGUMENTS[2]))


def model() -> nn.Module:
    return build_model("cnn", (1, 28, 28), 10, seed=0)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


class Laps:
    """Seconds between calls, without the first ones, in which everything is started."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def __call__(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def report(version: str, seconds: list[float]) -> None:
    print("\n" + json.dumps({"version": version, "seconds": seconds}), flush=True)


def time_rounds(version: str, one_round: Callable[[], object]) -> None:
    one_round()
    laps = Laps()
    laps()
    for _ in range(rounds()):
        one_round()
        laps()
    report(version, laps.seconds)
