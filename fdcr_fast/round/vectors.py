"""Vectors over clients: how they travel between host and device, and what they are computed with on either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fetch(values: Sequence[Any]) -> list[Any]:
    """Small tensors on the CPU, and what is no tensor as it is.

    Those on a device come by one copy, in float64: the host waits once for all of them.
    """
    there = [x for x in values if isinstance(x, Tensor) and not x.is_cpu]
    if not there:
        return list(values)
    numbers = torch.cat([x.double().reshape(-1) for x in there]).cpu()
    parts = iter(numbers.split([x.numel() for x in there]))
    return [next(parts).view(x.shape).to(x.dtype) if isinstance(x, Tensor) and not x.is_cpu else x for x in values]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host does not wait for what the device still has to do before."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def zeros(size: int, device: torch.device) -> Tensor:
    """So many zeros, float64."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(size))
    return torch.zeros(size, dtype=torch.float64, device=device)


def arrays(*vectors: Tensor) -> tuple[Any, ...]:
    """What vectors are computed with, and the vectors as its arrays; :func:`tensors` is the way back.

    On a device that is PyTorch, which waits for nothing there; on the CPU NumPy, whose calls on a few numbers take less
    than half of the time. Use only what both have alike.
    """
    if vectors[0].is_cpu:
        return np, *map(Tensor.numpy, vectors)
    return torch, *vectors


def tensors(*vectors: Any) -> list[Tensor]:
    """What was computed from arrays of :func:`arrays`."""
    return list(vectors) if isinstance(vectors[0], Tensor) else list(map(torch.from_numpy, vectors))
