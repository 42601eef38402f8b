"""Names of objects: import paths, names that packages add, and what is made again from them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from fdcr_fast import cli
from fdcr_fast.rules.coalition.rule import CoalitionFDCR
from fdcr_fast.sim import SimulationConfig
from fdcr_fast.sim.imports import Name, called, imported, installed, is_path, name_of
from fdcr_fast.sim.run import figures
from tests.support import users

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


def test_objects_have_names_from_which_they_are_made_again() -> None:
    module = "tests.support.users"
    assert name_of(users.Residual) == Name(f"{module}:Residual", {})
    assert name_of(users.smooth) == Name(f"{module}:smooth", {})
    assert name_of(functools.partial(users.Residual, width=8)) == Name(f"{module}:Residual", {"width": 8})
    assert name_of(users.DropLargest(count=3)) == Name(f"{module}:DropLargest", {"count": 3})
    assert name_of(users.Corner()) == Name(f"{module}:Corner", {})
    assert name_of(CoalitionFDCR(decay=1.0)) == Name("fdcr_fast.rules.coalition.rule:CoalitionFDCR", {"decay": 1.0})
    assert name_of(torch.optim.Adam) == Name("torch.optim.adam:Adam", {})
    for value in (users.Residual, users.smooth, torch.optim.Adam):
        assert imported("models", name_of(value).path) is value


def test_what_cannot_be_made_again_is_said_to_be_given() -> None:
    def local() -> None: ...

    assert name_of(local) == Name(f"given:{local.__qualname__}", {})
    assert name_of(lambda: None).path.startswith("given:")
    assert name_of(users.Stop(1, local)) == Name("given:Stop", {})
    assert name_of(users.Corner(target=torch.tensor(2))) == Name("given:Corner", {})  # type: ignore[arg-type]
    assert name_of(functools.partial(users.Residual, 3)) == Name("given:partial", {})
    assert is_path(name_of(local).path), "a configuration can hold it"


def test_what_cannot_be_imported_is_named() -> None:
    for path, message in (
        ("nowhere:model", "cannot import nowhere:model: ModuleNotFoundError: No module named 'nowhere'"),
        ("torch.nn:Lineal", "cannot import torch.nn:Lineal: AttributeError: .*Lineal"),
        ("__main__:nothing", "it was defined in a script: resume there"),
        ("given:Stop", r"this run was given a Stop in Python that cannot be imported.*resume\(folder"),
    ):
        with pytest.raises(ValueError, match=message):
            imported("models", path)
    with pytest.raises(ValueError, match=r"expected one of auto, cnn, .*; did you mean 'cnn'\? \(or lstm, "):
        SimulationConfig(model="cnnn")
    with pytest.raises(ValueError, match=r"server: torch\.nn:Linear must be a subclass of AggregationRule"):
        SimulationConfig(server="torch.nn:Linear").rule()


def test_functions_get_what_they_ask_for() -> None:
    known = {"image_shape": (1, 2), "num_classes": 3}
    assert called(lambda: "none", {}, known) == "none"
    assert called(lambda num_classes, width=1: (num_classes, width), {"width": 2}, known) == (3, 2)
    assert called(lambda num_classes: num_classes, {"num_classes": 7}, known) == 7
    assert called(dict, {"a": 1}, known) == {"a": 1}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package, installed."""
    text = (PLUGIN / "pyproject.toml").read_text()
    found = re.findall(r'\[project\.entry-points\."(\S+)"\]\n(\S+) = "(\S+)"', text)
    assert len(found) == 4
    info = tmp_path / "my_federation-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_federation\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {path}\n" for group, name, path in found))
    for path in (tmp_path, PLUGIN):
        monkeypatch.syspath_prepend(path)
    installed.cache_clear()
    yield
    installed.cache_clear()
    sys.modules.pop("my_federation", None)


@pytest.mark.skipif(not PLUGIN.exists(), reason="not a checkout")
@pytest.mark.usefixtures("plugin")
def test_a_package_adds_a_model_data_a_rule_and_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    assert len((PLUGIN / "my_federation.py").read_text().splitlines()) < 60
    names = {"model": "narrow", "dataset": "stripes", "server": "nearest", "attack": "inverted"}
    flags = [part for name, value in names.items() for part in (f"--{name}", value)]
    flags += ["--rounds", "2", "--local-epochs", "2", "--lr", "0.05", "--server-options", "{share: 0.6}"]
    done = CliRunner().invoke(cli.cli, ["simulate", *flags, "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: config[name] for name in names} == names
    records = (tmp_path / "run" / "clients.csv").read_text()
    assert records.count(",True,") >= 12
    again = CliRunner().invoke(cli.cli, ["simulate", "--resume", str(tmp_path / "run")], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    unknown = CliRunner().invoke(cli.cli, ["simulate", "--model", "narow"])
    assert "did you mean 'narrow'?" in unknown.output


def test_errors_of_parts_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users.DropLargest, "select", lambda self, clients: None)
    flags = ["--dataset", "tests.support.users:data", "--server", "tests.support.users:DropLargest", "--clients", "5"]
    done = CliRunner().invoke(cli.cli, ["simulate", *flags, "--local-epochs", "1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "round 1, server tests.support.users:DropLargest: TypeError: DropLargest must return a Sel" in done.output
    assert f"Resume with: fdcr-fast simulate --resume {tmp_path / 'run'}" in done.output.replace("\n", " ")
