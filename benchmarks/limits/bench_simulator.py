"""A small network's Fisher in the simulator beside its gradient pass."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_training_step import OPTIONS, PROBLEMS, SAMPLES, channels_last, client
from benchmarks.limits.report import REPORT, SHARE, judge
from benchmarks.targets import Target
from fdcr_fast.sim.run.simulation import num_threads
from fdcr_fast.sim.training.sgd import SGD, shuffled

__all__ = ["REPORT"]

MOST = 0.9  # of the time of the gradient pass


@pytest.mark.parametrize(("name", "shape"), PROBLEMS)
def test_fisher_beside_a_gradient_pass(bench, name, shape):
    _, classifier, start, images, labels, rows = client(name, shape)
    images = channels_last(images)

    def gradient_pass() -> None:
        order = shuffled(rows, 1, torch.Generator().manual_seed(0))
        classifier.train(start, images, labels, order, SGD(SAMPLES, **OPTIONS))

    contenders = {"ours": lambda: classifier.fisher(start, images, labels, rows), "gradient pass": gradient_pass}
    with num_threads(1):
        found = bench.compare(contenders, SHARE)
    row = f"Fisher, {name} of {'x'.join(map(str, shape))} images"
    judge(bench, row, None, found, "gradient pass", Target(MOST, "multiple"))
