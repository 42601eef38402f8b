"""The table of rules, the exports of ``fdcr_fast`` and docs/rules.md name the same rules."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fdcr_fast
from fdcr_fast import AggregationRule, FedAvg, MultiKrum
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.table import RULES, rule_named

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
EXPORTED = {
    name
    for name in fdcr_fast.__all__
    if isinstance(rule := getattr(fdcr_fast, name), type) and issubclass(rule, AggregationRule)
} - {"AggregationRule"}


def test_every_exported_rule_has_a_name() -> None:
    assert {row.rule_class.__name__ for row in RULES.values()} == EXPORTED


def test_one_name_of_a_rule_stands_for_no_option() -> None:
    plain = [row.rule_class for row in RULES.values() if not row.options]
    assert len(set(plain)) == len(plain) == len(EXPORTED)
    for row in RULES.values():
        assert set(row.options) <= set(row.option_names)


@pytest.mark.skipif(not PAGE.exists(), reason="not a checkout")
def test_the_documentation_lists_the_table() -> None:
    table = PAGE.read_text().partition("| rule | `--server` |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1:3] for line in table.splitlines()[2:] if "told who is malicious" not in line]
    classes, names = ([text for pair in cells for text in re.findall(r"`(.*?)`", pair[i])] for i in (0, 1))
    assert sorted(names) == sorted(RULES)
    assert {name.partition("(")[0] for name in classes} == EXPORTED
    assert len(classes) == len(names)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_made_of_what_a_server_knows(name: str) -> None:
    class Data:
        refine = update = evaluate = staticmethod(lambda params: params)

    row = RULES[name]
    rule = row.make(ServerOptions(0.1, None, 2, 5, Data()), {"norm_bound": 9.0})  # type: ignore[arg-type]
    assert type(rule) is row.rule_class
    assert rule.norm_bound == 9
    for option, value in row.options.items():
        assert getattr(rule, option) == value
    needs_data = row.rule_class.needs_server_data
    assert needs_data == bool({"refine", "server_update", "evaluate"} & set(inspect.signature(type(rule)).parameters))
    without = ServerOptions(0.1, None, 2, 5, None)
    if needs_data:
        with pytest.raises(ValueError, match="needs data of the server"):
            row.make(without, {})
    else:
        row.make(without, {})


def test_rules_by_the_names_of_rows_and_classes() -> None:
    assert rule_named("norm-clipping", {}) == rule_named("FedAvg", {"clip": "median"}) == FedAvg(clip="median")
    assert rule_named("multi-krum", {"num_byzantine": 2}) == MultiKrum(num_byzantine=2)
    with pytest.raises(TypeError, match="num_byzantine"):
        rule_named("MultiKrum", {})
    with pytest.raises(ValueError, match=r"no rule 'StateStore' in fdcr_fast: there are FedAvg, FDCR, CoalitionFDCR"):
        rule_named("StateStore", {})
