"""Random draws of a server, which are new in every round without a memory, and noise on the global parameters."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates


def round_generator(seed: int, purpose: str, global_params: Tensor) -> torch.Generator:
    """A generator that depends on a secret seed and on the global parameters a round starts from.

    The same round gives the same draws again, after a restart too, and no client who does not know the seed can
    foresee them.
    """
    params = global_params.detach().cpu().contiguous()
    params = params.as_strided(params.shape, [1])  # one parameter is contiguous at any stride
    digest = hashlib.blake2b(f"{seed}/{purpose}/".encode(), digest_size=8)
    digest.update(params.view(torch.uint8).numpy().data)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)


def with_noise(params: Tensor, deviation: float, generator: torch.Generator, clients: ClientUpdates) -> Tensor:
    """``params + N(0, deviation^2)``, drawn on the CPU in float32, or in float64 for such parameters, after a round.

    Every process draws the noise of all parameters, and adds that of its own.
    """
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    drawn = torch.randn(clients.num_params, generator=generator, dtype=dtype)
    noise = clients.shard.own(drawn).mul_(deviation).to(params.device)
    limit = torch.finfo(params.dtype).max
    return noise.add_(params.to(dtype)).clamp_(-limit, limit).to(params.dtype)


def distinct(count: int, below: int, generator: torch.Generator) -> Tensor:
    """So many different numbers in ``[0, below)``, ascending, of which each set is equally likely."""
    if 2 * count > below:
        return torch.randperm(below, generator=generator)[:count].sort().values
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:  # those who come again are drawn anew
        more = torch.randint(below, (count - len(drawn),), generator=generator).numpy()
        drawn = np.sort(np.concatenate([drawn, more]))  # in a tenth of the time of torch.unique
        drawn = drawn[np.append(True, drawn[1:] != drawn[:-1])]
    return torch.from_numpy(drawn)


def check_deviation(name: str, value: float) -> None:
    """Raise ValueError unless it can be a standard deviation."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
