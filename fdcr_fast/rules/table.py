"""The aggregation rules by name: for configurations, job files and the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.coalition.rule import CoalitionFDCR
from fdcr_fast.rules.coordinatewise.alignins import AlignIns
from fdcr_fast.rules.coordinatewise.median import CoordinateMedian
from fdcr_fast.rules.coordinatewise.rlr import RLR
from fdcr_fast.rules.coordinatewise.trimmed_mean import TrimmedMean
from fdcr_fast.rules.crfl import CRFL
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.rules.pairwise.bulyan import Bulyan
from fdcr_fast.rules.pairwise.dnc import DnC
from fdcr_fast.rules.pairwise.flame import FLAME
from fdcr_fast.rules.pairwise.foolsgold import FoolsGold
from fdcr_fast.rules.pairwise.geometric_median import GeometricMedian
from fdcr_fast.rules.pairwise.krum import Krum, MultiKrum
from fdcr_fast.rules.pairwise.multi_metrics import MultiMetrics
from fdcr_fast.rules.server_data.finetuning import Finetuning
from fdcr_fast.rules.server_data.fltrust import FLTrust
from fdcr_fast.rules.server_data.sageflow import Sageflow
from fdcr_fast.rules.server_options import ServerOptions


@dataclass(frozen=True)
class NamedRule:
    """A row of the table.

    Attributes:
        rule_class: The class, a dataclass whose fields are the rule's options.
        options: Options that the name stands for.
    """

    rule_class: type[AggregationRule]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def option_names(self) -> tuple[str, ...]:
        """The options that the rule takes."""
        return tuple(signature(self.rule_class).parameters)

    def make(self, server: ServerOptions, options: Mapping[str, Any]) -> AggregationRule:
        """The rule of a server that knows ``server``; ``options`` go before whatever follows from that or the name.

        Raises:
            TypeError: an option is unknown, or of a type that it cannot have.
            ValueError: an option has a value that it cannot have, or the rule needs data that the server has not.
        """
        rule: Any = self.rule_class.from_options(server)
        changed: AggregationRule = replace(rule, **{**self.options, **options})
        return changed


RULES = {
    "fedavg": NamedRule(FedAvg),
    "fdcr": NamedRule(FDCR),
    "coalition-fdcr": NamedRule(CoalitionFDCR),
    "norm-clipping": NamedRule(FedAvg, {"clip": "median"}),
    "median": NamedRule(CoordinateMedian),
    "trimmed-mean": NamedRule(TrimmedMean),
    "krum": NamedRule(Krum),
    "multi-krum": NamedRule(MultiKrum),
    "geometric-median": NamedRule(GeometricMedian),
    "bulyan": NamedRule(Bulyan),
    "foolsgold": NamedRule(FoolsGold),
    "rlr": NamedRule(RLR),
    "dnc": NamedRule(DnC),
    "flame": NamedRule(FLAME),
    "alignins": NamedRule(AlignIns),
    "crfl": NamedRule(CRFL),
    "multi-metrics": NamedRule(MultiMetrics),
    "fltrust": NamedRule(FLTrust),
    "finetuning": NamedRule(Finetuning),
    "sageflow": NamedRule(Sageflow),
}


def rule_named(name: str, options: Mapping[str, Any]) -> AggregationRule:
    """The rule of this name in the table, or of the class of this name, from nothing but its own options.

    Raises:
        ValueError: there is no such rule, or an option has a value that it cannot have.
        TypeError: an option is missing, unknown, or of a type that it cannot have.
    """
    classes = {row.rule_class.__name__: row for row in RULES.values() if not row.options}
    row = RULES.get(name) or classes.get(name)
    if row is None:
        raise ValueError(f"there is no rule {name!r} in fdcr_fast: there are {', '.join(classes)}")
    return row.rule_class(**{**row.options, **options})
