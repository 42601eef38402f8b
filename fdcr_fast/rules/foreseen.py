"""Rounds whose outcome was computed in the reading that their norms were taken in, as if nobody were rejected.

That is nearly always so. Screening comes after it and is the same; where it rejects somebody, the round is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.arguments import require_finite
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.vectors import fetch
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Outcome

_NORM_MARGIN = 1e-4  # norms from float32 products are right to much less
_TINY = 5e-324

# The outcome of a round, and its squared norms and the ranges of its Fishers, on the CPU.
Read: TypeAlias = tuple[Outcome, list[Tensor | None]]


@dataclass(frozen=True)
class _Foreseen(ClientUpdates):
    """A round that was read before it was screened, with the outcome for the case that nobody is rejected."""

    outcome: Outcome = field(kw_only=True)

    def screened(self, *, importance: bool, norm_bound: float | None) -> ClientUpdates:
        """The round itself: :func:`foreseen` has made sure that its rule rejects nobody."""
        return self


def foreseen(rule: AggregationRule, clients: ClientUpdates, single: bool, read: Callable[[], Read]) -> _Foreseen | None:
    """A round that nobody had read, after one reading; None if somebody is rejected, or if norms forbid ``single``.

    Args:
        rule: Rule by whose bounds clients are rejected.
        clients: The round, yet to be screened.
        single: Whether products are formed in float32.
        read: The reading.
    """
    outcome, statistics = read()
    known = clients.with_statistics(*statistics)
    if not all_pass(rule, known) or readings.fits_single(known) != single:
        return None
    return _Foreseen(**vars(known), outcome=outcome)


def foreseen_outcome(clients: ClientUpdates) -> Outcome | None:
    """The outcome, if it was foreseen for these clients."""
    return clients.outcome if isinstance(clients, _Foreseen) and clients.rows is None else None


def all_pass(rule: AggregationRule, clients: ClientUpdates) -> bool:
    """Whether nobody is rejected, nor would be if norms were a little different.

    Those of float32 products may be lost where they are small: they could be anything below, and set a smaller median.
    """
    bound = rule.norm_bound
    bound = None if bound is None else max(bound * (1 - _NORM_MARGIN), 1.0)
    lost = readings.least_norm(clients) ** 2
    squares = clients.squared_norm.numpy()
    if (squares < lost).any():
        clients = clients.with_norms(torch.from_numpy(np.where(squares < lost, _TINY, squares)))
    return clients.screened(importance=rule.needs_fishers, norm_bound=bound).rows is None


class MeanRule(AggregationRule):
    """A rule that weighs all valid clients by their samples, whatever they sent, and makes something of their mean.

    A class that extends it may decide, weigh and combine in its own way: its rounds are then read for norms first.
    """

    def of_mean(self, global_params: Tensor, clients: ClientUpdates, mean: Tensor) -> Tensor:
        """New global parameters from those that the mean gives, which may be written to; here these."""
        return mean

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """What becomes of the weighted mean."""
        return self.of_mean(global_params, clients, super().combine(global_params, clients, weights))

    def _measured(self, global_params: Tensor, clients: ClientUpdates) -> ClientUpdates:
        """The norms come from the reading for the mean, if that needs none."""
        known = None
        own: type = type(self)
        if not (self.needs_norms or self.rescale) and _is_plain_mean(own):
            single = readings.may_fit_single(clients)
            known = foreseen(self, clients, single, lambda: self._read(global_params, clients, single))
        return super()._measured(global_params, clients) if known is None else known

    def _outcome(self, global_params: Tensor, clients: ClientUpdates) -> Outcome:
        outcome = foreseen_outcome(clients)
        if outcome is None:
            return super()._outcome(global_params, clients)
        selection, weights, mean = outcome
        return selection, weights, self.of_mean(global_params, clients, mean)

    def _read(self, global_params: Tensor, clients: ClientUpdates, single: bool) -> Read:
        on = clients.on_device()
        weights = self.weights(on, on.valid)
        norms, params = readings.norms_and_mean(global_params, on, weights, single=single)
        read = [weights, clients.finite, norms, clients.fisher_min, clients.fisher_max]
        weights, finite, *statistics = fetch(read)
        require_finite(finite)
        return (self.select(clients), weights, params), statistics


@cache
def _is_plain_mean(rule: type) -> bool:
    """Whether such rules take the mean of everybody by weights for which no norms are needed.

    One that has its own way to decide or to combine may look at them before, and so may own weights, unless what
    ``needs_norms`` says is about these: it comes from the same class, or from one that extends it.
    """
    if any(getattr(rule, name) is not getattr(MeanRule, name) for name in ("select", "judge", "shares", "combine")):
        return False
    weights, needs_norms = (
        next(i for i, c in enumerate(rule.__mro__) if name in vars(c)) for name in ("weights", "needs_norms")
    )
    return needs_norms <= weights
