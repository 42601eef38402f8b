"""What the repository says of itself in several places agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import fdcr_fast

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="not a checkout")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_version_and_date_of_the_release() -> None:
    heading = re.search(r"(?m)^## (\S+), (.+)$", text("CHANGELOG.md"))
    assert heading is not None
    version, date = heading.groups()
    assert version == fdcr_fast.__version__
    cited = yaml.safe_load(text("CITATION.cff"))
    assert cited["version"] == version
    assert date in (cited["date-released"], "not released yet")


def commands() -> list[str]:
    """What workflows and the hooks of commits run."""
    repos = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    found = [hook["entry"] for repo in repos for hook in repo["hooks"]]
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text())
        assert {"push", "workflow_dispatch"} <= set(workflow[True]), "YAML takes the key on for a truth value"
        found += [step["run"] for job in workflow["jobs"].values() for step in job.get("steps", []) if "run" in step]
    return found


def test_workflows_and_hooks_call_what_is_there() -> None:
    phony = re.search(r"(?m)^\.PHONY: (.*)$", text("Makefile"))
    assert phony is not None
    called = {command for line in commands() for command in re.findall(r"^make (?:--\S+ )*([\w-]+)", line)}
    assert {"lint", "lint-cpp", "test", "docs"} <= called <= set(phony[1].split())
    scripts = {word for line in commands() for word in line.split() if word.startswith(".ci/")}
    assert scripts == {".ci/run", ".ci/try-wheel"}
    assert all((ROOT / script).exists() for script in scripts)


def test_the_wheel_is_repaired_alike_wherever_it_is_built() -> None:
    excluded = [re.findall(r"--exclude '(\S+)'", text(name)) for name in ("Makefile", "pyproject.toml")]
    assert excluded[0] == excluded[1] != []


def test_the_wheel_holds_the_modules_of_those_that_try_it() -> None:
    built = re.search(r"(?m)^build = \[(.*)\]$", text("pyproject.toml"))
    assert built is not None
    tried = re.findall(r'"(cp\d+)-\*"', built[1])
    held = re.findall(r"/opt/python/(cp\d+)-cp\d+/bin/python", text("pyproject.toml"))
    assert held == tried
    promised = re.findall(r"Programming Language :: Python :: 3\.(\d+)", text("pyproject.toml"))
    assert {f"cp3{minor}" for minor in promised} <= set(tried)


def test_what_judges_layout_and_types_has_one_version() -> None:
    extra = re.search(r"(?m)^lint = \[(.*)\]$", text("pyproject.toml"))
    assert extra is not None
    assert all(re.search(rf'"{tool}==[\d.]+"', extra[1]) for tool in ("ruff", "mypy", "clang-format"))
