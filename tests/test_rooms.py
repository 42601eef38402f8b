"""The rooms of the package: each imports from those before it and none from itself in a circle, and all are small."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fdcr_fast

ROOT = Path(fdcr_fast.__file__).parent
CSRC = ROOT.parent / "csrc"
MAP = ROOT.parent / "docs" / "architecture.md"

# By package, in the order in which they import from each other. ``__init__`` are the names that the package exports.
ROOMS = {
    "fdcr_fast": (
        "_version", "_moved", "_lazy", "warning", "_native", "memory", "layout", "ops", "fisher", "round", "store",
        "distributed", "rules", "state_dicts", "_public", "__init__", "self_test", "sim", "integrations", "commands",
        "cli", "__main__",
    ),
    "fdcr_fast.sim": (
        "costs", "similarity", "names", "imports", "seeding", "datasets", "training", "attacks", "notation",
        "server_data", "servers", "settings", "config", "parts", "task", "clients", "execution", "run", "loggers",
        "study", "page", "_public", "__init__",
    ),
}  # fmt: skip

MOST_LINES = {".py": 400, ".inc": 500, ".h": 500, ".cpp": 500, ".cu": 500, ".cuh": 500}
MOST_FILES = 13  # besides __init__.py
# What is still larger. Whoever mends it takes it out.
LONG_FILES: set[str] = set()
FULL_FOLDERS = {"csrc/cuda"}


def modules() -> dict[str, Path]:
    """The files of the package, by names that end in ``__init__`` for a package."""
    return {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of the package, inside of functions too."""
    names = modules()

    def module_of(*candidates: str) -> set[str]:
        return {next(m for name in candidates for m in (name, f"{name}.__init__") if m in names)}

    found: dict[str, set[str]] = {module: set() for module in names}
    for module, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fdcr_fast":
                for alias in node.names:
                    found[module] |= module_of(f"{node.module}.{alias.name}", str(node.module))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "fdcr_fast":
                        found[module] |= module_of(alias.name)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: an import that does not say where from"
    return found


def room(module: str, house: str) -> str | None:
    """The room of a package in which a module lies; None if it lies outside of the package."""
    inside = module.removeprefix(f"{house}.")
    return None if inside == module else inside.split(".")[0]


@pytest.mark.parametrize("house", ROOMS)
def test_every_room_imports_from_those_before_it(house: str) -> None:
    order = ROOMS[house]
    assert {room(module, house) for module in imports()} - {None} == set(order)
    for module, imported in imports().items():
        for other in imported:
            own, its = room(module, house), room(other, house)
            if own is not None and its is not None:
                assert order.index(its) <= order.index(own), f"{module} imports {other}"


@pytest.mark.skipif(not MAP.exists(), reason="no documentation: not a checkout")
def test_the_map_shows_who_imports_from_whom() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", MAP.read_text())
    shown = {own: set(re.findall(r"`(\w+)`", others)) for own, others in rows}
    found: dict[str, set[str]] = {own: set() for own in shown}
    for module, imported in imports().items():
        own = str(room(module, "fdcr_fast"))
        if own in found:
            found[own] |= {str(room(other, "fdcr_fast")) for other in imported} - {own}
    assert found == shown
    assert {own for own in ROOMS["fdcr_fast"] if (ROOT / own).is_dir()} <= set(shown)


def test_no_module_imports_itself_by_way_of_others() -> None:
    order = list(TopologicalSorter(imports()).static_order())
    walk = "training.base", "clients.work", "run.federation"
    places = [order.index(f"fdcr_fast.sim.{module}") for module in walk]
    assert places == sorted(places)


def test_honest_training_knows_of_no_attack() -> None:
    honest = "fdcr_fast.sim.datasets.", "fdcr_fast.sim.training."
    assert not [module for module, imported in imports().items() for other in imported
                if module.startswith(honest) and other.startswith("fdcr_fast.sim.attacks")]  # fmt: skip


def sources() -> list[Path]:
    files = [path for folder in (ROOT, CSRC) for path in folder.rglob("*") if path.suffix in MOST_LINES]
    assert len(files) > 150
    return files


@pytest.mark.skipif(not CSRC.exists(), reason="no sources: not a checkout")
def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sources()}
    long = {path for path, count in lines.items() if count > MOST_LINES[path.suffix]}
    assert {path.relative_to(ROOT.parent).as_posix() for path in long} == LONG_FILES


@pytest.mark.skipif(not CSRC.exists(), reason="no sources: not a checkout")
def test_folders_hold_few_files() -> None:
    files = Counter(path.parent for path in sources() if path.name != "__init__.py")
    full = {folder for folder, count in files.items() if count > MOST_FILES}
    assert {folder.relative_to(ROOT.parent).as_posix() for folder in full} == FULL_FOLDERS
