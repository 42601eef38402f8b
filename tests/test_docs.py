"""The documentation has every public name, and its code runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="not a checkout")


def documented() -> set[str]:
    """The full names of the entries of the API reference."""
    names = set()
    for page in (DOCS / "api").glob("*.rst"):
        module = ""
        for directive, name in re.findall(r"(?m)^\.\. ([\w:]+):: (\S+)", page.read_text()):
            if directive == "currentmodule":
                module = name
            elif directive in ("automodule", "autoclass", "autofunction", "autopydantic_model", "autodata", "data"):
                names.add(name if directive == "automodule" else f"{module}.{name}")
    return names


@pytest.mark.parametrize("package", ["", ".ops", ".self_test", ".sim", ".sim.study", ".fisher.layers"])
def test_every_public_name_has_an_entry(package: str) -> None:
    module = importlib.import_module(f"fdcr_fast{package}")
    assert {f"{module.__name__}.{name}" for name in module.__all__} <= documented()


def test_every_entry_is_public() -> None:
    framework = ("fdcr_fast.integrations.",)  # they need their frameworks
    for name in sorted(documented()):
        if not name.startswith(framework):
            module, _, attribute = name.rpartition(".")
            assert attribute in importlib.import_module(module).__all__, name


def test_the_public_classes_and_functions_of_integrations_have_an_entry() -> None:
    for path in (ROOT / "fdcr_fast" / "integrations").glob("*.py"):
        names = re.findall(r"(?m)^(?:class|def) ([A-Za-z]\w*)", path.read_text())
        if path.stem != "npy":  # what two of them share
            assert {f"fdcr_fast.integrations.{path.stem}.{name}" for name in names} <= documented()


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def test_rounds_runs() -> None:
    names: dict[str, object] = {}
    exec(code_of("rounds.md"), names)
    assert names["result"].rejected == {}
    assert torch.equal(names["G"], names["G"].T)


def test_the_users_own_model_data_rule_and_attack_run() -> None:
    model_and_data, rule_and_attack = re.findall(r"```python\n(.*?)```", (DOCS / "simulator.md").read_text(), re.DOTALL)
    assert len(model_and_data.splitlines()) <= 25
    assert len(rule_and_attack.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(model_and_data, names)
    assert names["result"].summary.accuracy > 0.8
    assert names["result"].buffers.numel() == 2 * 16 + 1
    exec(rule_and_attack, names)
    assert names["result"].summary.attack_success_rate < 0.2
    assert all(record.true_positive_rate == 1 for record in names["result"].rounds)


def test_the_rule_and_the_attack_of_the_tutorial_run() -> None:
    names: dict[str, object] = {}
    exec(code_of("tutorial/own-rule-and-attack.md"), names)
    assert all(len(ids) == 3 for ids in names["dropped"])
    accuracy, success = names["table"]["FedAvg", "poisoned"]
    assert accuracy > 80
    assert success > 80
    accuracy, success = names["table"]["CoalitionFDCR", "poisoned"]
    assert accuracy > 80
    assert success < 10
    assert len(names["table"]) == 8
