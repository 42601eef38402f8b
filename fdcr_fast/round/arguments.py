"""What is asked of what is handed in for a round: tensors, and the names by which clients are known."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_floating(name: str, tensor: object, shape: str) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor with as many dimensions as ``shape`` names."""
    if not isinstance(tensor, Tensor):
        hint = "; states by name are for aggregate_state_dicts and StateStore" if isinstance(tensor, Mapping) else ""
        raise TypeError(f"expected {name} {shape} to be a torch.Tensor, got {type(tensor).__name__}{hint}")
    if not tensor.is_floating_point():
        raise TypeError(f"expected floating-point {name} {shape}, got {tensor.dtype}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"expected {name} {shape}, got shape {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` lies where the updates lie."""
    if tensor.device != device:
        raise ValueError(f"expected {name} on the device of the updates, {device}, got {tensor.device}")


def all_finite(vector: Tensor) -> bool:
    """Whether all numbers are finite, of which there is at least one; a tenth of the time of ``isfinite().all()``."""
    low, high = vector.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def require_finite(finite: Tensor | bool | None) -> None:
    """Raise unless the global parameters are finite, or known to be."""
    if finite is not None and not finite:
        raise ValueError("global_params are not finite")


def plain_id(client: Any) -> Hashable:
    """A client's id; NumPy's and PyTorch's scalars as Python's.

    Raises:
        TypeError: it is None, or has no hash that tells it from others.
    """
    if isinstance(client, np.generic) or (isinstance(client, Tensor) and client.dim() == 0):
        client = client.item()
    if client is None or isinstance(client, Tensor) or not isinstance(client, Hashable):
        raise TypeError(f"client ids must be strings or integers (or have another hash), got {client!r}")
    return client


def different_ids(client_ids: Iterable[Any] | None, count: int) -> tuple[Hashable, ...]:
    """The ids of so many clients, by default their numbers.

    Raises:
        TypeError: one cannot be an id.
        ValueError: they are not so many different ones.
    """
    if client_ids is not None and not isinstance(client_ids, Iterable):
        raise TypeError(f"expected {count} different client ids, got {client_ids!r}")
    ids = tuple(range(count)) if client_ids is None else tuple(map(plain_id, client_ids))
    if len(ids) != count or len(set(ids)) != count:
        raise ValueError(f"expected {count} different client ids, got {list(ids)}")
    return ids
