"""The check of an installation passes here, and fails where anything that it looks at is wrong."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._pytree import tree_leaves

import fdcr_fast
from fdcr_fast import __main__
from fdcr_fast.cli import cli
from fdcr_fast.ops.operator import OPERATORS
from fdcr_fast.self_test import checks, self_test


def test_everything_is_right_here() -> None:
    lines: list[str] = []
    assert self_test(lines.append)
    rows = [line.split() for line in lines[1:-1]]
    assert {row[1] for row in rows if row[0] == "operator"} == set(OPERATORS)
    backend = "cpu" if fdcr_fast.backends()["cpu"].usable else "reference"
    assert all(backend in row for row in rows if "cuda" not in row and "triton" not in row)
    assert all(row[-1] == "ok" for row in rows)
    assert lines[-1].startswith(f"{len(rows)} of {len(rows)} checks passed in ")


def scaled(result: Any) -> Any:
    """One part in a thousand too much."""
    if isinstance(result, torch.Tensor):
        return result * 1.001
    return tuple(map(scaled, result))


def failed(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, change: Callable[[Any], Any]) -> set[str]:
    """Which checks fail where one function gives something else."""
    function = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: change(function(*args, **options)))
    return {check.name for check in checks() if check.failure() is not None}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_operator_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = OPERATORS[name].reference

    def wrong(*args: Any) -> Any:
        result = reference(*args)
        if result is None:  # what it is about it has written
            for written in tree_leaves(args):
                if isinstance(written, torch.Tensor):
                    written *= 1.001
        return None if result is None else scaled(result)

    monkeypatch.setattr(OPERATORS[name], "reference", wrong)
    check = next(check for check in checks() if check.name == f"operator {name}")  # on the CPU: these come first
    assert str(check.failure()).startswith("AssertionError")


def test_a_wrong_fisher_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(monkeypatch, fdcr_fast, "diagonal_fisher", scaled) == {"diagonal Fisher of a network"}


def test_wrong_parameters_or_clients_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(result: Any) -> Any:
        return dataclasses.replace(result, params=result.params * 1.001)

    def nobody_dropped(result: Any) -> Any:
        return dataclasses.replace(result, kept=torch.ones_like(result.kept))

    for change in (moved, nobody_dropped):
        with monkeypatch.context() as patch:
            found = failed(patch, fdcr_fast.AggregationRule, "aggregate", change)
        assert found == {"round of FDCR", "round of CoalitionFDCR"}


def test_the_command_fails_where_a_check_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    done = CliRunner().invoke(cli, ["info", "--self-test"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(fdcr_fast.info())
    monkeypatch.setattr(fdcr_fast, "diagonal_fisher", lambda *args, **options: torch.ones(5370))
    done = CliRunner().invoke(cli, ["info", "--self-test"])
    assert done.exit_code == 1
    assert "FAILED: AssertionError: Tensor-likes are not close!" in done.output
    # The same without the packages of the command line.
    monkeypatch.setattr(__main__, "find_spec", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["fdcr-fast", "info", "--self-test"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    assert "FAILED" in capsys.readouterr().out
