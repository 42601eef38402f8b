"""The examples for plain PyTorch run, and show what the documentation says."""

from __future__ import annotations

import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "pytorch"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="not a checkout")


def main(name):
    threads = torch.get_num_threads()
    try:
        return runpy.run_path(str(FOLDER / name))["main"]()
    finally:
        torch.set_num_threads(threads)


def test_fewer_than_ten_changed_lines_defend_a_script():
    before, after = ((FOLDER / name).read_text().splitlines() for name in ("fedavg.py", "defended.py"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[1:].strip()]
    assert len([line for line in changes if line[0] == "+"]) < 10
    assert len([line for line in changes if line[0] == "-"]) < 10
    accuracy, success = main("fedavg.py")
    assert accuracy > 0.9
    assert success > 0.5
    accuracy, success = main("defended.py")
    assert accuracy > 0.9
    assert success < 0.1


@pytest.mark.parametrize(
    ("script", "framework", "extra"),
    [
        ("flower/run.py", "flwr", "flower"),
        ("nvflare/job.py", "nvflare", "nvflare"),
        ("byzfl/compare.py", "byzfl", "byzfl"),
    ],
)
def test_without_its_framework_an_example_says_what_to_install(script, framework, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"fdcr_fast.integrations.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'fdcr_fast[{extra}]'")):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
