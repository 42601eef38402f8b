"""A library that is missing, damaged or another one: that is said, and PyTorch takes its place or the import fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdcr_fast
from fdcr_fast.ops.operator import OPERATORS

SHOW = """
import torch, fdcr_fast
assert fdcr_fast.__file__.startswith({folder!r})
assert fdcr_fast.FedAvg().aggregate(torch.zeros(3), torch.ones(2, 3), num_samples=[1, 1]).params.tolist() == [1, 1, 1]
print(fdcr_fast.backends()["cpu"])
print(fdcr_fast.info())
"""


@pytest.fixture
def package(tmp_path):
    """A copy without the library; with the module, without which that of an editable installation would be found."""
    source = Path(fdcr_fast.__file__).parent
    ignored = shutil.ignore_patterns("libfdcr_fast.so", "__pycache__", "sim")
    shutil.copytree(source, tmp_path / "fdcr_fast", ignore=ignored)
    return tmp_path / "fdcr_fast"


def imported(package, backend):
    folder = str(package.parent)
    environment = {**os.environ, "PYTHONPATH": folder, "FDCR_FAST_BACKEND": backend}
    command = [sys.executable, "-c", SHOW.format(folder=folder)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def missing(library):
    return "not built"


def damaged(library):
    library.write_text("no library" * 100)
    return "invalid ELF header"  # what the system says of it


def another(library):
    """As after an update of which the compiled part was left out."""
    shutil.copy(torch._C.__file__, library)
    return f"no kernels for {', '.join(list(OPERATORS)[:3])}"


@pytest.mark.parametrize("make", [missing, damaged, another])
def test_what_is_wrong_with_it_is_said(package, make):
    reason = make(package / "libfdcr_fast.so")
    done = imported(package, "auto")
    assert done.returncode == 0, done.stderr
    status, *info = done.stdout.splitlines()
    assert "usable=False" in status
    assert reason in status
    assert any("backend cpu: not usable" in line and reason in line for line in info)


def test_one_that_is_asked_for_and_cannot_be_used_ends_the_import(package):
    reason = another(package / "libfdcr_fast.so")
    done = imported(package, "cpu")
    assert done.returncode != 0
    assert "ImportError: FDCR_FAST_BACKEND=cpu: " in done.stderr
    assert reason in done.stderr
