"""Random draws of a server that are new in every round without a memory."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def round_generator(seed: int, purpose: str, global_params: Tensor) -> torch.Generator:
    """A generator that depends on a secret seed and on the global parameters a round starts from.

    The same round gives the same draws again, after a restart too, and no client who does not know the seed can
    foresee them.
    """
    params = global_params.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{seed}/{purpose}/".encode(), digest_size=8)
    digest.update(params.view(torch.uint8).numpy().data)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)
