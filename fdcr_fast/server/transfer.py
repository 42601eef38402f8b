"""Between host and device: the only two ways in which vectors over clients travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fetch(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Small tensors on the CPU. Those on a device come by one copy, in float64: the host waits once for all of them."""
    there = [x for x in tensors if x is not None and x.device.type != "cpu"]
    if not there:
        return list(tensors)
    numbers = torch.cat([x.double().reshape(-1) for x in there]).cpu()
    parts = iter(numbers.split([x.numel() for x in there]))
    return [x if x is None or x.device.type == "cpu" else next(parts).view(x.shape).to(x.dtype) for x in tensors]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host does not wait for what the device still has to do before."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
