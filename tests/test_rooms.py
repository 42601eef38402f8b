"""The rooms of the simulator: each imports from those before it, and none from itself in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fdcr_fast.sim

ROOT = Path(fdcr_fast.sim.__file__).parent
ROOMS = (
    "costs", "names", "seeding", "datasets", "training", "attacks", "notation", "server_data", "servers", "config",
    "task", "clients", "execution", "run", "study",
)  # fmt: skip


def imports() -> dict[str, set[str]]:
    """What each module imports of the simulator, by names without its own."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fdcr_fast.sim"):
                package = (node.module or "").removeprefix("fdcr_fast.sim").lstrip(".")
                names = {f"{package}.{alias.name}".lstrip(".") for alias in node.names}
                found.setdefault(module, set()).update(names & set(modules) or {package})
    return found


def test_every_room_imports_from_those_before_it() -> None:
    for module, imported in imports().items():
        room = module.split(".")[0]
        if room == "__init__":
            continue
        for other in imported:
            assert ROOMS.index(other.split(".")[0]) <= ROOMS.index(room), f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    order = list(TopologicalSorter(imports()).static_order())
    assert order.index("training.classifier") < order.index("clients.work") < order.index("run.federation")


def test_honest_training_knows_of_no_attack() -> None:
    assert not [module for module, imported in imports().items() for other in imported
                if module.split(".")[0] in ("datasets", "training") and other.startswith("attacks")]  # fmt: skip
