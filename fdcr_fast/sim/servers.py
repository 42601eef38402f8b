"""What the simulator adds to the table of rules: a baseline that is told who is malicious, and what servers assume.

The rules of ``RULES`` are made from :class:`ServerOptions` and options of their own: nothing says who is malicious.
``INFORMED_BASELINES`` are told, serve as yardsticks only, and are named so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import Selection
from fdcr_fast.rules.table import RULES, NamedRule
from fdcr_fast.sim.imports import imported


@dataclass(frozen=True)
class Oracle(AggregationRule):
    """Baseline that is told who is malicious, drops exactly them and averages the others by sample count."""

    sharded = True
    attackers: frozenset[int]

    def select(self, clients: ClientUpdates) -> Selection:
        """Keep whoever is not malicious."""
        return Selection(torch.tensor([client not in self.attackers for client in clients.clients]))


INFORMED_BASELINES = {"oracle": Oracle}

# Settings that are options of a rule under their own names; ``server_options`` reaches all others.
OWN_SETTINGS = {
    "fdcr": ("discrepancy", "cluster", "partition", "rescale", "importance", "norm_bound"),
    "coalition-fdcr": ("gate", "norm_bound"),
}


def row_of(server: str) -> NamedRule:
    """The row of a rule's name in the table, or one for a class of the user's.

    Raises:
        ValueError: it cannot be imported, or is no class of rules.
    """
    if server in RULES:
        return RULES[server]
    rule = imported("rules", server)
    if not (isinstance(rule, type) and issubclass(rule, AggregationRule)):
        raise ValueError(f"server: {server} must be a subclass of AggregationRule, got {rule!r}")
    return NamedRule(rule)


def rule_class(server: str) -> type[AggregationRule]:
    """The class of a server's rule."""
    return INFORMED_BASELINES[server] if server in INFORMED_BASELINES else row_of(server).rule_class


def assumed_byzantine(server: str, clients: int, wanted: int | None, rule: type[AggregationRule] | None = None) -> int:
    """How many Byzantine clients a server assumes: by default 30 %, rounded down, or as many as its rule can stand.

    Raises:
        ValueError: there are not enough clients.
    """
    f = int(0.3 * clients + 1e-9) if wanted is None else wanted
    least = (rule_class(server) if rule is None else rule).min_clients
    while wanted is None and f > 0 and least(f) > clients:
        f -= 1
    if least(f) > clients:
        raise ValueError(f"{server} with num_byzantine={f} needs at least {least(f)} clients, got {clients}")
    return f
