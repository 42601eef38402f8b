"""The rule that drops a coalition of clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.shares import clipped_shares
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.coalition.search import Views, find_coalition, margins, membership, set_scores
from fdcr_fast.rules.coalition.state import CoalitionState
from fdcr_fast.rules.coalition.trust import (
    attack_likelihood,
    believed,
    charges,
    core,
    median_alignment,
    model_agreement,
    trusted,
)
from fdcr_fast.rules.coalition.views import cautious_views, features_of, round_views, standard_scores, standardised
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.valid_clients import of_all, valid_ids

_CONCENTRATION_WEIGHT = 0.3  # of c beside A in J
_SCORED_CONCENTRATION = 0.5  # weight of c beside p and x in the scores
_GATE_PERMUTATIONS = 19
_GATE_DEVIATIONS = 1.5


@dataclass(frozen=True)
class CoalitionShare:
    """Why one client was kept or dropped: how much it is part of the set ``S`` that was found, by view.

    For the members of ``S`` the mean of each share is the bracket of that view in ``J``; for the others it tells how
    they would have fitted in. Positive is like the coalition.

    Attributes:
        kept: Whether the client was aggregated.
        similarity: ``A_kS - A_kR``, both means without the client itself; to a set of this client alone 0 - ``A_kR``.
        distance: ``A_RR - A_kR``.
        concentration: ``c_k - c_R``.
        agreement: Mean cosine of the client's updates and the global parameters; None where it is not known, in the
            first round and with ``start="bold"``.
    """

    kept: bool
    similarity: float
    distance: float
    concentration: float
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class CoalitionFDCR(AggregationRule):
    """Drop the minority of clients that resemble each other most, as attackers who plant one backdoor do.

    With ``D_k`` the update of client ``k``, ``F_k`` its diagonal Fisher and ``Pbar = mean_k F_k / sum F_k``, the
    importance of each parameter to all clients, each round gives

    - ``A_ij``: the cosine of ``u_i - mean u`` and ``u_j - mean u``, where ``u_k`` is ``Pbar^(1/4) D_k`` at length 1,
    - ``r_k = log(sum_head Pbar D_k^2 / sum_head D_k^2)`` and ``kappa_k = log(mean(q^2) / mean(q)^2)`` over the features
      with ``q = D_k^2 / (Pbar + regularisation mean Pbar)``; ``c = zs(r) + zs(kappa)``,

    both standardised over the round's clients, averaged over the rounds that clients and pairs took part in (one that
    lies ``t`` rounds back counts ``decay^t``), and standardised again, ``c`` times 0.3. A set ``S`` of clients, ``R``
    the others, is a coalition as far as ``J(S) = sqrt(|S| |R|) (A_SS - 2 A_SR + A_RR + c_S - c_R)`` is large, see
    :func:`fdcr_fast.rules.coalition.search.find_coalition`. It takes an honest majority:
    ``|S| <= floor((K - 1) / 2)``, and with fewer than 3 clients nobody is dropped.

    With ``start="cautious"`` the rule keeps a backdoor out while it is unsure who attacks. ``A`` is that of the
    features alone, and ``c = zs(kurtosis of the features) + zs(kurtosis of all) / 2``, the kurtosis being
    ``log(mean(D_k^4) / mean(D_k^2)^2)``. ``scores`` holds ``zs(p) - zs(x) + zs(c) / 2``: each client's probability
    ``p_k`` of being in a coalition (see :func:`fdcr_fast.rules.coalition.search.membership`) is weighed against what
    speaks for it by itself, over the features: in the first round ``<D_k, m> / ||D_k||``, ``m`` being the median of
    every parameter, and from there ``x_k``, the mean of ``cos(D_k, w)`` over the last rounds
    (:func:`fdcr_fast.rules.coalition.trust.model_agreement`), as far as it is believed
    (:func:`fdcr_fast.rules.coalition.trust.believed`): what is more than 0.3 above the median counts twice against the
    client. For two rounds 30 % of the clients are kept, those of the least score, then 10 % more in each round, and
    from the fifth round on all; from the third round on without those against whom there is more than 1.2 of
    ``max(0, 1 - x_k / h) + max(0, e_k) + 1.5 p_k / (1 + exp((5.6 sqrt(K) - J) / 2))``, with ``h`` the core's median of
    ``x``, ``e_k`` the mean of the features' kurtosis above the median client's, and ``J`` the largest. Updates are
    clipped to the round's median norm.

    With ``start="bold"`` the set that maximises ``J`` is dropped from the first round on, whether anybody attacks or
    not; one wrong decision in the first rounds then loses the run. ``scores`` holds by how much the best set with a
    client beats the best one without it, see :func:`fdcr_fast.rules.coalition.search.margins`, and nothing depends on
    the scale of any update. In both, nothing depends on the scale of any Fisher, a client's own counts only by its
    share in ``Pbar``, and the kept are averaged by sample count, without rescaling.

    The rule remembers earlier rounds in ``state``, which every call of ``aggregate`` updates and :meth:`reset` clears:
    a rule is one experiment's. Where it was found and what it does not reach: docs/research-coalition.md.

    Args:
        groups: Which parameters are the head and the features; None takes all parameters as both.
        state: State of earlier rounds, such as ``CoalitionState.from_json(text)``.
        start: ``"cautious"`` or ``"bold"``, see above.
        gate: Of a bold start: drop nobody in rounds in which the best set does not stand out: after the first
            ``gate_from`` rounds, ``J`` must exceed the mean of those of 19 problems with the clients permuted in ``c``
            by 1.5 of their standard deviations.
        gate_from: Rounds before which the gate is open.
        decay: In (0, 1], what a round counts beside the next one.
        max_clients: Clients remembered, those seen last; memory is 16 bytes for each pair of them.
        regularisation: Share of the mean of ``Pbar`` that is added to it in ``kappa``.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; None for none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
        seed: Seed of the gate's permutations.
    """

    sharded = True
    groups: ParamGroups | None = None
    state: CoalitionState = field(default_factory=CoalitionState, hash=False)
    start: Literal["cautious", "bold"] = "cautious"
    gate: bool = False
    gate_from: int = 4
    decay: float = 0.8
    max_clients: int = 2000
    regularisation: float = 0.01
    norm_bound: float | None = 100.0
    max_weight_share: float | None = None
    seed: int = 0
    importance: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_options()
        if self.gate and self.start == "cautious":
            raise ValueError('gate goes with start="bold": a cautious start drops nobody for being the best set')
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")
        if self.max_clients < 1:
            raise ValueError(f"max_clients must be at least 1, got {self.max_clients}")
        if not 0 < self.regularisation < math.inf:
            raise ValueError(f"regularisation must be positive and finite, got {self.regularisation}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> CoalitionFDCR:
        """The rule for the model's head and features."""
        return cls(groups=options.groups)

    @property
    def needs_norms(self) -> bool:
        """Whether updates are clipped."""
        return self.start == "cautious"

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """Find the coalition in this round's views and those remembered, and keep whom that leaves to be trusted."""
        ids = valid_ids(clients)
        if len(ids) < 3:
            return Selection(clients.valid)
        groups = ParamGroups.whole(clients.num_params) if self.groups is None else self.groups
        self.state.check_model(clients.num_params)
        if self.start == "bold":
            return self._bold(clients, ids, round_views(clients, groups, self.regularisation))
        return self._cautious(global_params, clients, ids, groups)

    def _bold(self, clients: ClientUpdates, ids: list[Any], seen: Views) -> Selection:
        views = _standard(self._remember(ids, seen))
        members, score = find_coalition(views)
        dropped = members if self._stands_out(views, score) else torch.zeros_like(members)
        return _selection(clients, ids, dropped, margins(members, views), views, members, None)

    def _cautious(
        self, global_params: Tensor, clients: ClientUpdates, ids: list[Any], groups: ParamGroups
    ) -> Selection:
        features = features_of(global_params, clients, groups)
        means = self._remember(ids, cautious_views(clients, groups, features))
        views = _standard(means)
        members, score = find_coalition(views)
        suspicion = membership(members, views)
        odd = standard_scores(suspicion) + _SCORED_CONCENTRATION * standard_scores(means.concentration)
        if self.state.rounds == 1:  # the model may have learned nothing yet
            scores = odd - standard_scores(median_alignment(global_params, clients, groups, features))
            return _selection(clients, ids, ~core(scores, 1), scores, views, members, None)
        seen = model_agreement(global_params, clients, groups, features)
        agreement, excess = self.state.agree(ids, seen, features.excess)
        known = believed(agreement)
        scores = odd - standard_scores(known)
        first = core(scores, self.state.rounds)
        coalition = suspicion * attack_likelihood(score, len(ids))
        kept = trusted(first, charges(known, known[first].median(), excess, coalition), self.state.rounds)
        return _selection(clients, ids, ~kept, scores, views, members, agreement)

    def _remember(self, ids: list[Any], seen: Views) -> Views:
        return self.state.remember(ids, seen, decay=self.decay, max_clients=self.max_clients)

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """Shares of the samples, less for updates that are clipped."""
        shares = self.shares(clients, kept)
        if self.start == "bold":
            return shares
        norms = clients.squared_norm.sqrt()
        return clipped_shares(shares, norms, clients.of_valid(norms).median())

    def set_scores(self, clients: Sequence[Any]) -> Callable[[Tensor], Tensor] | None:
        """``J`` of sets of a round's clients, as it was searched; None for fewer than 3."""
        return None if len(clients) < 3 else partial(set_scores, views=_standard(self.state.means(clients)))

    def reset(self) -> None:
        """Forget earlier rounds."""
        self.state.clear()

    def memory(self) -> bytes:
        """The state as JSON."""
        return self.state.to_json().encode()

    def with_memory(self, memory: bytes) -> CoalitionFDCR:
        """The rule with the state of another one."""
        return replace(self, state=CoalitionState.from_json(memory.decode()))

    def _stands_out(self, views: Views, score: float) -> bool:
        if not self.gate or self.state.rounds <= self.gate_from:
            return True
        generator = torch.Generator().manual_seed(self.seed + self.state.rounds)
        chance = torch.empty(_GATE_PERMUTATIONS, dtype=torch.float64)
        for i in range(_GATE_PERMUTATIONS):
            order = torch.randperm(len(views), generator=generator)
            chance[i] = find_coalition(replace(views, concentration=views.concentration[order]))[1]
        return bool(score - chance.mean() >= _GATE_DEVIATIONS * chance.std(correction=0))


def _standard(means: Views) -> Views:
    """What ``J`` takes of the means over the rounds."""
    return Views(standardised(means.similarity), _CONCENTRATION_WEIGHT * standard_scores(means.concentration))


def _selection(
    clients: ClientUpdates,
    ids: list[Any],
    dropped: Tensor,
    scores: Tensor,
    views: Views,
    members: Tensor,
    agreement: Tensor | None,
) -> Selection:
    kept = clients.valid & ~of_all(clients, dropped)
    explanation = _explanation(ids, views, members, dropped, agreement)
    return Selection(kept, of_all(clients, scores), explanation=explanation)


def _explanation(
    clients: list[Any], views: Views, members: Tensor, dropped: Tensor, agreement: Tensor | None
) -> dict[Hashable, CoalitionShare]:
    inside, outside = members.double(), (~members).double()
    A, c = views.similarity, views.concentration

    def mean_to(group: Tensor) -> Tensor:
        return (A @ group) / (group.sum() - group).clamp(min=1)  # the diagonal is 0: without the client itself

    r = outside.sum()
    to_rest = mean_to(outside)
    rest = (outside @ A @ outside) / (r * (r - 1))
    shares = torch.stack([mean_to(inside) - to_rest, rest - to_rest, c - (c @ outside) / r]).tolist()
    agreed = [None] * len(clients) if agreement is None else agreement.tolist()
    return {
        client: CoalitionShare(not gone, *share)
        for client, gone, *share in zip(clients, dropped.tolist(), *shares, agreed, strict=True)
    }
