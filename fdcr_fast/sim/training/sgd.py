"""Stochastic gradient descent as clients do it: its settings, and the order in which it takes the images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SGD(NamedTuple):
    """Mini-batch stochastic gradient descent with momentum and weight decay."""

    batch_size: int
    lr: float
    momentum: float
    weight_decay: float


def shuffled(indices: Tensor, epochs: int, generator: torch.Generator) -> Tensor:
    """The given images once per epoch, each time in another order, ``[epochs, n]``."""
    order = torch.empty(epochs, len(indices), dtype=torch.int64)
    for epoch in order:
        torch.randperm(len(indices), generator=generator, out=epoch)
    return indices[order]


def batches(indices: Tensor, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """So many batches of the given images, of which none comes again before all have come, ``[steps, size]``.

    They are of ``batch_size`` images, or of all where there are fewer.
    """
    size = min(batch_size, len(indices))
    epochs = math.ceil(steps * size / len(indices))
    return shuffled(indices, epochs, generator).reshape(-1)[: steps * size].view(steps, size)
