"""Rules that look on: how they judge the attackers of a round, whose model another rule decides about.

They are made, called and resumed as servers are, and see what the server sees. Who attacked is compared here with what
they say, and handed to none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdcr_fast import UpdateStore
from fdcr_fast.round import readings
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.coalition.search import minorities
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.sim.execution.ranks import Processes
from fdcr_fast.sim.run.metrics import share
from fdcr_fast.sim.run.records import RankRecord, ScoreRecord

_MOST_RANKED = 14  # clients: of more there are too many sets to compare all
_ROUNDING = 1e-9  # two scores of one set that were computed in different batches


class Watch:
    """The rules that look on, and what they said of the last round.

    Attributes:
        rules: By name.
        scores: A record for each rule and each client that has sent something.
        ranks: A record for each rule.
    """

    def __init__(self, rules: Mapping[str, AggregationRule]) -> None:
        self.rules = dict(rules)
        self.scores: list[ScoreRecord] = []
        self.ranks: list[RankRecord] = []

    def memories(self) -> dict[str, bytes]:
        """What each rule remembers of the rounds that it has seen."""
        return {name: rule.memory() for name, rule in self.rules.items()}

    def remember(self, memories: Mapping[str, bytes]) -> None:
        """Go on with what the rules of an earlier process remembered."""
        self.rules |= {name: self.rules[name].with_memory(memory) for name, memory in memories.items()}

    def look(self, round: int, params: Tensor, processes: Processes, store: UpdateStore, attackers: Set[int]) -> None:
        """Let every rule judge the round that is in the store, and record what it says.

        Args:
            round: Number of the round.
            params: Global parameters as they were sent out, ``[P]``.
            processes: Who holds the round.
            store: The uploads, which stay as they are.
            attackers: Who attacked in this round.
        """
        self.scores, self.ranks = [], []
        if not self.rules:
            return
        norms = readings.squared_norms(processes.uploads(store)).sqrt().cpu()
        for name, rule in self.rules.items():
            result = processes.aggregate(rule, params, store)
            scores, ranks = judged(name, round, rule, result, norms, attackers)
            self.scores += scores
            self.ranks.append(ranks)


def judged(
    name: str, round: int, rule: AggregationRule, result: AggregationResult, norms: Tensor, attackers: Set[int]
) -> tuple[list[ScoreRecord], RankRecord]:
    """How a rule judged a round: client by client, and all attackers together.

    Args:
        name: The rule's name.
        round: Number of the round.
        rule: The rule after it.
        result: What it made of the round.
        norms: Norms of the updates of ``result.clients``, ``[K]``.
        attackers: Who attacked.
    """
    valid = result.labels >= 0
    clients = [client for client, usable in zip(result.clients, valid.tolist(), strict=True) if usable]
    malicious = torch.tensor([client in attackers for client in result.clients], dtype=torch.bool)
    # The more suspected come first; of those with one score all have the rank of the first.
    positions = (result.scores > result.scores[:, None]).sum(1)
    median = norms[valid].median() if clients else torch.tensor(torch.nan)
    scores = [
        ScoreRecord(
            round=round,
            rule=name,
            client=client,
            malicious=attacks,
            score=_defined(score),
            rank=None if score != score else position,
            kept=kept,
            relative_norm=_defined(norm),
        )
        for client, attacks, score, position, kept, norm in zip(
            map(_number, result.clients),
            malicious.tolist(),
            result.scores.tolist(),
            positions.tolist(),
            result.kept.tolist(),
            (norms / median).tolist(),
            strict=True,
        )
    ]
    dropped = [record.client for record in scores if not record.kept]
    of_attackers = [record.rank for record in scores if record.malicious and record.rank is not None]
    sets = _ranked_sets(rule, clients, malicious[valid], ~result.kept[valid])
    return scores, RankRecord(
        round=round,
        rule=name,
        attackers=len(attackers),
        true_positive_rate=share(dropped, attackers),
        false_positive_rate=share(dropped, [record.client for record in scores if not record.malicious]),
        area_under_curve=area_under_curve(result.scores, malicious),
        first_rank=min(of_attackers, default=None),
        last_rank=max(of_attackers, default=None),
        **sets._asdict(),
    )


def area_under_curve(scores: Tensor, malicious: Tensor) -> float | None:
    """The area under the receiver operating characteristic: how often an attacker's score is above a benign client's.

    Equal scores count half. None where a score is missing on one of the sides.

    Args:
        scores: ``[K]``; those that are NaN are left out.
        malicious: bool ``[K]``.
    """
    known = ~scores.isnan()
    ours, others = scores[known & malicious], scores[known & ~malicious]
    if not len(ours) or not len(others):
        return None
    above, equal = (ours[:, None] > others).double(), (ours[:, None] == others).double()
    return (above + equal / 2).mean().item()


class _Sets(NamedTuple):
    """What a rule that judges sets says of the attackers' one; fields of :class:`RankRecord`."""

    sets: int | None = None
    set_rank: int | None = None
    set_score: float | None = None
    dropped_score: float | None = None


def _ranked_sets(rule: AggregationRule, clients: Sequence[Any], malicious: Tensor, dropped: Tensor) -> _Sets:
    score = rule.set_scores(clients)
    if score is None or not malicious.any() or malicious.all():
        return _Sets()
    own, of_dropped = score(torch.stack([malicious, dropped])).tolist()
    chosen = of_dropped if dropped.any() else None
    if len(clients) > _MOST_RANKED:
        return _Sets(set_score=own, dropped_score=chosen)
    others = score(minorities(len(clients)))
    above = others > own + _ROUNDING * abs(own)
    return _Sets(len(others), int(above.sum()), own, chosen)


def _defined(value: float) -> float | None:
    return None if value != value else value


def _number(client: Any) -> int:
    return int(client)
