"""Stochastic gradient descent as clients do it: its settings, and the order in which it takes the images."""

from __future__ import annotations

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
