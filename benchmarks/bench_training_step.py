"""A small client of the simulator: one step of SGD on its samples, and its Fisher, with one thread.

python -m pytest benchmarks/bench_training_step.py --threads 1
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Bench, Times
from benchmarks.tables import Report
from fdcr_fast import diagonal_fisher
from fdcr_fast.sim.training.classifier import Classifier, classifier_of
from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.sgd import SGD, shuffled

SAMPLES = 50
OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
PROBLEMS = [("cnn", (1, 28, 28)), ("cnn", (3, 32, 32)), ("cnn", (1, 16, 16)), ("mlp", (1, 28, 28))]

REPORT = Report(
    "training_step",
    "Local training step",
    "python -m pytest benchmarks/bench_training_step.py --threads 1",
    f"""\
One client of {SAMPLES} samples: load the global parameters, one step of SGD with momentum and weight decay on all
samples, and the flat parameters back. *ms*: of ours, median. The other columns: time of each over ours, medians of
interleaved repeats in one process (quartiles of the ratios within the rounds). *eager*: autograd and
``torch.optim.SGD(fused=True)``, for contiguous and for channels-last models and images; *compiled*: model and loss
under ``torch.compile``. *Fisher*: the client's diagonal Fisher, ``diagonal_fisher`` over ours.""",
)


def plain_step(
    model: nn.Module, start: Tensor, images: Tensor, labels: Tensor, rows: Tensor, compiled: bool
) -> Callable[[], Tensor]:
    """The same by autograd."""
    params = list(model.parameters())
    pieces = start.split([p.numel() for p in params])

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    loss = torch.compile(mean_loss) if compiled else mean_loss

    def step() -> Tensor:
        with torch.no_grad():
            for p, values in zip(params, pieces, strict=True):
                p.copy_(values.view(p.shape))
        optimizer = torch.optim.SGD(params, fused=True, **OPTIONS)
        optimizer.zero_grad()
        loss(images[rows], labels[rows]).backward()
        optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in params])

    return step


class Client(NamedTuple):
    """Before its round, with a model of its own for autograd."""

    model: nn.Module
    classifier: Classifier
    start: Tensor
    images: Tensor
    labels: Tensor
    rows: Tensor


def client(name: str, shape: tuple[int, ...]) -> Client:
    torch.manual_seed(0)
    model = build_model(name, shape, 10, seed=0)
    images, labels = torch.randn(4 * SAMPLES, *shape), torch.randint(10, (4 * SAMPLES,))
    rows = torch.randperm(len(images))[:SAMPLES]
    classifier = classifier_of(copy.deepcopy(model))
    return Client(model, classifier, classifier.params(), images, labels, rows)


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "shape"), PROBLEMS)
def test_training_step(bench, name, shape):
    model, classifier, start, images, labels, rows = client(name, shape)
    last = channels_last(images)
    model_of_last = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def ours() -> Tensor:
        order = shuffled(rows, 1, torch.Generator().manual_seed(0))
        return classifier.train(start, last, labels, order, SGD(64, **OPTIONS))

    steps = {
        "ours": ours,
        "eager": plain_step(model, start, images, labels, rows, compiled=False),
        "eager, channels-last": plain_step(model_of_last, start, last, labels, rows, compiled=False),
        "compiled": plain_step(copy.deepcopy(model), start, images, labels, rows, compiled=True),
    }
    expected = steps["eager"]() - start
    for step in steps.values():
        assert (step() - start - expected).norm() < 1e-4 * expected.norm()
    row(bench, name, shape, bench.compare(steps).times)


@pytest.mark.parametrize(("name", "shape"), PROBLEMS)
def test_fisher(bench, name, shape):
    model, classifier, start, images, labels, rows = client(name, shape)
    last = channels_last(images)
    contenders = {
        "ours": lambda: classifier.fisher(start, last, labels, rows),
        "Fisher": lambda: diagonal_fisher(model, (images[rows], labels[rows])),
    }
    row(bench, f"{name}, Fisher", shape, bench.compare(contenders).times)


def row(bench: Bench, name: str, shape: tuple[int, ...], times: dict[str, Times]) -> None:
    own = times["ours"]
    cells = {"": name, "images": "x".join(map(str, shape)), "ms": f"{1e3 * own.median:.2f}"}
    for peer in list(times)[1:]:
        low, high = times[peer].spread_over(own)
        cells[peer] = f"**{times[peer].over(own):.1f}** ({low:.1f} to {high:.1f})"
    cells["rounds"] = str(len(own.seconds))
    bench.add(f"{name}, {shape}", cells, {key: t.seconds for key, t in times.items()})
