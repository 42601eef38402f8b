"""The documents for contributors name files, tables and targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = {"CONTRIBUTING.md": [ROOT], "docs/architecture.md": [ROOT, ROOT / "fdcr_fast"]}  # where their paths begin
GUIDE = ROOT / "CONTRIBUTING.md"
PATH = re.compile(r"[\w.]+(/[\w.]+)*/?")
TABLE = re.compile(r"[A-Z]+(_[A-Z]+)*")

pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="not a checkout")


def sections(document: str) -> list[str]:
    return re.split(r"(?m)^(?=## )", (ROOT / document).read_text())


def code_in(section: str) -> list[str]:
    """What stands between backticks, but for blocks of code."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", section)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def paths_in(section: str) -> list[str]:
    """Files and folders: what has a slash, in code or as an argument of a command."""
    words = [word for span in code_in(section) for word in span.split()]
    return [word for word in words if "/" in word and PATH.fullmatch(word) and not word.startswith(".venv/")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    paths = [path for section in sections(document) for path in paths_in(section)]
    assert len(paths) > 20
    assert [path for path in paths if not any((folder / path).exists() for folder in DOCUMENTS[document])] == []


def test_every_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        folder = (ROOT / document).parent
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert "://" in target or (folder / target).exists(), f"{document}: {target}"


def test_every_table_is_in_a_file_that_its_section_names() -> None:
    def holds(path: str, table: str) -> bool:
        return re.search(rf"(?m)^({table}\b.* = |class {table}\b)", (ROOT / path).read_text()) is not None

    found = set()
    for section in sections("CONTRIBUTING.md"):
        for table, path in re.findall(r"`([A-Z_]+)`\s+(?:of\s+|\()`([^`]+)`", section):
            assert holds(path, table), f"{table} of {path}"
        modules = [path for path in paths_in(section) if path.endswith(".py")]
        for table in filter(TABLE.fullmatch, code_in(section)):
            if table.startswith("STABLE_"):  # of PyTorch
                continue
            assert any(holds(path, table) for path in modules), table
            found.add(table)
    assert {"RULES", "METRICS", "ATTACKS", "CLUSTERINGS", "DATASETS"} <= found


def test_every_target_of_make_and_every_module_to_run_is_there() -> None:
    text = GUIDE.read_text()
    made = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())
    assert made is not None
    assert set(re.findall(r"(?:`|    )make ([\w-]+)", text)) <= set(made[1].split())
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert modules
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)
