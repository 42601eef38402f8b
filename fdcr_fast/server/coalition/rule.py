"""The aggregation rule that drops a coalition."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fdcr_fast.server.coalition.search import Views, find_coalition
from fdcr_fast.server.coalition.state import CoalitionState
from fdcr_fast.server.coalition.views import ParamGroups, round_views, standard_scores, standardised
from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationRule, Selection

_GATE_PERMUTATIONS = 19


@dataclass(frozen=True)
class CoalitionShare:
    """Why one client was kept or dropped: how much it is part of the set ``S`` that was found, by view.

    For the members of ``S`` the mean of each share is the bracket of that view in ``J``; for the others it tells how
    they would have fitted in. Positive is like the coalition.

    Attributes:
        kept: Whether the client was aggregated.
        update: ``A_kS - A_kR``, both means without the client itself.
        importance: ``B_RR - B_kR``.
        concentration: ``c_k - c_R``.
    """

    kept: bool
    update: float
    importance: float
    concentration: float


@dataclass(frozen=True, kw_only=True)
class CoalitionFDCR(AggregationRule):
    r"""Drop the minority of clients that resemble each other most, as attackers who plant one backdoor do.

    With ``D_k`` the update of client ``k``, ``F_k`` its diagonal Fisher, ``Phi_k = F_k / sum F_k`` and ``Pbar`` the
    mean of the ``Phi_k``, each round gives

    - ``A_ij = cos(sqrt(F_i) D_i, sqrt(F_j) D_j)``: updates measured in Fisher length,
    - ``B_ij = cos(F_i^(1/4), F_j^(1/4))`` over the features: similarity of importances,
    - ``r_k = log(sum_head Pbar D_k^2 / sum_head D_k^2)`` and ``kappa_k = log(mean(q^2) / mean(q)^2)`` over the features
      with ``q = D_k^2 / (Pbar + regularisation mean Pbar)``; ``c = zs(r) + zs(kappa)``,

    all standardised over the round's clients, averaged over the rounds that clients and pairs took part in, and
    standardised again. The set ``S`` with the largest ``J``, see
    :func:`fdcr_fast.server.coalition.search.find_coalition`, is dropped and the others are averaged by sample count,
    without rescaling. Nothing depends on the scale of any update or Fisher. It takes an honest majority:
    ``|S| <= floor((K - 1) / 2)``, and with fewer than 3 clients nobody is dropped. Without the gate somebody is always
    dropped, attack or not.

    The rule remembers earlier rounds in ``state``, which every call of ``aggregate`` updates.

    Args:
        groups: Which parameters are the head and the features; None takes all parameters as both.
        state: Of earlier rounds, such as ``CoalitionState.from_json(text)``.
        gate: Drop nobody in rounds in which the best set does not stand out: from the round ``gate_from`` on, ``J``
            must exceed the mean of those of 19 problems with the clients permuted independently in ``B`` and ``c`` by 3
            of their standard deviations.
        gate_from: Rounds before which the gate is open.
        regularisation: ``lambda``.
        norm_bound: See :class:`fdcr_fast.FDCR`.
        max_weight_share: Likewise.
        seed: Of the gate's permutations.
    """

    sharded = True
    groups: ParamGroups | None = None
    state: CoalitionState = field(default_factory=CoalitionState, compare=False, repr=False)
    gate: bool = False
    gate_from: int = 4
    regularisation: float = 0.01
    norm_bound: float | None = 100.0
    max_weight_share: float | None = None
    seed: int = 0
    importance: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_options()
        if not 0 < self.regularisation < math.inf:
            raise ValueError(f"regularisation must be positive and finite, got {self.regularisation}")

    def select(self, clients: ClientUpdates) -> Selection:
        """Find the coalition in this round's views and those remembered, and drop it."""
        rows = clients.valid.nonzero().flatten()
        ids = [clients.clients[k] for k in rows.tolist()]
        if len(ids) < 3:
            return Selection(clients.valid)
        groups = ParamGroups.whole(clients.num_params) if self.groups is None else self.groups
        means = self.state.remember(ids, round_views(clients, groups, self.regularisation))
        views = Views(standardised(means.update), standardised(means.importance), standard_scores(means.concentration))
        members, score = find_coalition(views)
        dropped = members if self._stands_out(views, score) else torch.zeros_like(members)
        kept = clients.valid.clone()
        kept[rows[dropped]] = False
        return Selection(kept, explanation=_explanation(ids, views, members, dropped))

    def memory(self) -> bytes:
        """The state as JSON."""
        return self.state.to_json().encode()

    def with_memory(self, memory: bytes) -> CoalitionFDCR:
        """The rule with the state of another one."""
        return replace(self, state=CoalitionState.from_json(memory.decode()))

    def _stands_out(self, views: Views, score: float) -> bool:
        rounds = int(self.state.together.diagonal().max())
        if not self.gate or rounds <= self.gate_from:
            return True
        generator = torch.Generator().manual_seed(self.seed + rounds)
        chance = torch.empty(_GATE_PERMUTATIONS, dtype=torch.float64)
        for i in range(_GATE_PERMUTATIONS):
            b, c = (torch.randperm(len(views), generator=generator) for _ in range(2))
            shuffled = replace(views, importance=views.importance[b][:, b], concentration=views.concentration[c])
            chance[i] = find_coalition(shuffled)[1]
        return bool(score - chance.mean() >= 3 * chance.std(correction=0))


def _explanation(clients: list[Any], views: Views, members: Tensor, dropped: Tensor) -> dict[Hashable, CoalitionShare]:
    inside, outside = members.double(), (~members).double()
    A, B, c = views.update, views.importance, views.concentration

    def mean_to(matrix: Tensor, group: Tensor) -> Tensor:
        return (matrix @ group) / (group.sum() - group).clamp(min=1)  # the diagonal is 0: without the client itself

    r = outside.sum()
    rest = (outside @ B @ outside) / (r * (r - 1))
    update = mean_to(A, inside) - mean_to(A, outside) if inside.sum() > 1 else torch.zeros_like(c)
    shares = zip(update.tolist(), (rest - mean_to(B, outside)).tolist(), (c - (c @ outside) / r).tolist(), strict=True)
    return {
        client: CoalitionShare(not gone, *share)
        for client, gone, share in zip(clients, dropped.tolist(), shares, strict=True)
    }
