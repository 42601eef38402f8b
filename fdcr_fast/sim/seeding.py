"""Random generators addressed by what they are for, so that no draw depends on the order of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive_seed(seed, "shuffle", round, client)``."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator of its own for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator of its own for one purpose."""
    return np.random.default_rng(derive_seed(seed, purpose, *indices))


def with_torch_seed(seed: int, build: Callable[[], T]) -> T:
    """Call ``build`` under torch's global generator seeded with ``seed``; the generator's state is restored.

    Layers of ``torch.nn`` draw their initial weights from the global generator and accept no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
