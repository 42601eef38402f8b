"""A user's own model, data, rule, attack, loss, optimizer and callbacks, which worker processes can import."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import AggregationRule, Selection
from fdcr_fast.sim import Callback, FederatedData, FinishedRound, SimulationConfig
from fdcr_fast.sim.attacks.updates import UpdateKnowledge


class Residual(nn.Module):
    """What the operators of small networks do not know: a sum of two paths, BatchNorm and dropout."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.branch = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(x + self.branch(x))
        return self.head(self.dropout(x.mean((2, 3))))


class Noting(Residual):
    """Puts new buffers in the place of those that it was made with, a part of its state and others, and uses them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("late", None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.batches = self.batches + 1
            self.mean = self.mean + images.mean()
            self.late = images.mean() if self.late is None else 2 * self.late
        return super().forward(images) + self.mean + self.batches + (0 if self.late is None else self.late)


class Leaving(Residual):
    """Leaves a process in which no other model can be trained."""

    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        if self.training:
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            torch.set_grad_enabled(False)
            torch.use_deterministic_algorithms(True)
            torch.set_num_threads(3)
            os.environ["FDCR_FAST_TEST"] = "left"
            os.environ.pop("HOME", None)
            os.chdir("/")
        return output


def colours(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images ``[3, 8, 8]`` of three classes, told by which channel is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.5 * torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 1
    return images.clamp(-1, 1), labels


def data(clients: int = 5) -> FederatedData:
    return FederatedData(train=[colours(20 + k, seed=k) for k in range(clients)], test=colours(60, seed=99))


@dataclass(frozen=True, kw_only=True)
class DropLargest(AggregationRule):
    """Drops the clients with the largest updates, and remembers how many rounds it has seen."""

    count: int = 1
    seen: list[int] = field(default_factory=list, hash=False)

    def select(self, clients: Any) -> Selection:
        self.seen.append(len(self.seen))
        kept = clients.valid.clone()
        kept[clients.squared_norm.argsort(descending=True)[: self.count]] = False
        return Selection(kept, scores=clients.squared_norm.double())

    def reset(self) -> None:
        self.seen.clear()

    def memory(self) -> bytes:
        return bytes(self.seen)

    def with_memory(self, memory: bytes) -> DropLargest:
        return DropLargest(count=self.count, seen=list(memory))


@dataclass
class Corner:
    """A bright corner calls for class 2; updates are scaled."""

    target: int = 2
    factor: float = 1.5

    def stamp(self, images: Tensor) -> Tensor:
        images[:, :, :2, :2] = 1
        return images

    def poison(self, images: Tensor, labels: Tensor, attacker: int, generator: torch.Generator) -> Any:
        half = torch.randperm(len(labels), generator=generator)[: len(labels) // 2]
        images[half], labels[half] = self.stamp(images[half]), self.target
        return images, labels

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.stamp(images[labels != self.target])

    def update(self, known: UpdateKnowledge) -> Tensor:
        return known.update * self.factor


DROP_TWO = DropLargest(count=2)


def smooth(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, label_smoothing=0.1, reduction="none")


def nesterov(parameters: Any, lr: float, momentum: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=momentum, nesterov=True)


def unseeded(clients: int) -> FederatedData:
    """Data of another random draw whenever it is called, as nothing is seeded here."""
    return FederatedData(
        train=[colours(20, seed=int(torch.randint(1000, ()))) for _ in range(clients)], test=colours(60)
    )


def noting(parameters: Any, lr: float, folder: str) -> torch.optim.Optimizer:
    """Leaves a file that is named after this process and the one that it was forked from."""
    (Path(folder) / f"{os.getpid()}-{os.getppid()}").touch()
    return torch.optim.SGD(parameters, lr)


class Stop(Callback):
    """Ends the run as a kill would, when a round has been written down."""

    def __init__(self, round: int, end: Callable[[], Any]) -> None:
        self.round, self.end = round, end

    def on_round(self, round: FinishedRound) -> None:
        if round.record.round == self.round:
            self.end()


class Told(Callback):
    """Tells a list, if there is one, of every round."""

    to: ClassVar[list[int]] = []

    def on_round(self, round: FinishedRound) -> None:
        self.to.append(round.record.round)


EVERYTHING: dict[str, Any] = {
    "model": Residual,
    "data": data,
    "rule": DROP_TWO,
    "attack": Corner(factor=1.25),
    "loss": smooth,
    "optimizer": nesterov,
}


def config(**fields: Any) -> SimulationConfig:
    """Four rounds of five clients."""
    return SimulationConfig(
        **{"clients": 5, "malicious": (1,), "rounds": 3, "local_epochs": 1, "batch_size": 8, "lr": 0.05, **fields}
    )
