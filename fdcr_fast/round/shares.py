"""The part of a sum over clients that each of them has, its share: by its samples, and within a limit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdcr_fast.round.screening import FEWEST_SAMPLES, count_fits
from fdcr_fast.round.vectors import arrays, tensors

_NO_SAMPLES = FEWEST_SAMPLES**2  # which is nothing beside any valid count


def limited_shares(shares: Tensor, limit: float | None) -> Tensor:
    """The shares with none above ``limit``: ``min(limit, c * share)`` with the ``c`` for which they add up to 1.

    Args:
        shares: Not negative, float64 ``[K]``, adding up to 1, or all 0. Those that are 0 stay so.
        limit: In (0, 1]; None for no limit. Where so few shares are positive that all of them at the limit do not
            reach 1, they become equal.
    """
    if limit is None:
        return shares
    positive = shares > 0
    count = positive.sum()
    descending = shares.sort(descending=True).values
    cut = torch.arange(len(shares), dtype=shares.dtype, device=shares.device)
    rest = descending.flip(0).cumsum(0).flip(0)  # of the i-th and all smaller ones
    # With the i largest at the limit, the others are scaled by this. It is never more than c, and c for the right i.
    scale = torch.where(cut < count, (1 - cut * limit) / rest, 0.0).max()
    limited = torch.where(positive, (shares * scale).clamp(max=limit), shares)
    equal = positive.to(shares.dtype) / count
    return torch.where(shares.max() > limit, torch.where(count * limit <= 1, equal, limited), shares)


def clipped_shares(shares: Tensor, norms: Tensor, longest: Any) -> Tensor:
    """The shares, float64 ``[K]``, times ``min(1, longest / norm)``, as if longer updates were scaled down."""
    return torch.where(norms > longest, shares * (longest / norms), shares)


def sample_shares(num_samples: Tensor, chosen: Tensor) -> Tensor:
    """``n_k / sum n`` over the chosen clients, 0 for the others (eq. 11); float64 ``[K]``."""
    xp, counts, chosen = arrays(num_samples, chosen)
    counts = xp.where(chosen & count_fits(counts), counts, 0.0)  # of infinite ones no share follows
    (shares,) = tensors(counts / (counts.sum() + _NO_SAMPLES))
    return shares
