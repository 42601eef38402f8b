"""The names by which clients are known."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from torch import Tensor


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
