"""Building with and without what it needs, in a copy of the sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no sources: not a checkout")


@pytest.fixture
def sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("fdcr_fast", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def build(sources, mode, **env):
    return subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "out"],
        cwd=sources,
        env={**os.environ, "FDCR_FAST_BUILD": mode, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def built(sources):
    assert (sources / "out" / "fdcr_fast" / "__init__.py").exists()
    return list((sources / "out" / "fdcr_fast").glob("_C*"))


NO_COMPILER = {"CC": "false", "CXX": "false"}


def test_off_does_not_try(sources):
    result = build(sources, "off", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert built(sources) == []
    assert "without its compiled kernels" not in result.stderr


def test_auto_goes_on_without_a_compiler_and_says_so(sources):
    result = build(sources, "auto", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert built(sources) == []
    assert "without its compiled kernels" in result.stderr


def test_require_fails_without_a_compiler(sources):
    result = build(sources, "require", **NO_COMPILER)
    assert result.returncode != 0
    assert "false" in result.stderr


def test_an_unknown_mode_is_refused(sources):
    result = build(sources, "perhaps")
    assert result.returncode != 0
    assert "expected auto, off or require" in result.stderr


def test_auto_goes_on_after_a_compile_error_and_says_which(sources):
    with (sources / "csrc" / "module.cpp").open("a") as file:
        file.write("this is not C++;\n")
    result = build(sources, "auto", FDCR_FAST_CXXFLAGS="-O0 -fsyntax-only")
    assert result.returncode == 0, result.stderr
    assert built(sources) == []
    assert "without its compiled kernels" in result.stderr


def test_cuda_that_is_asked_for_and_cannot_be_built_fails_with_the_reason(sources):
    result = build(sources, "auto", FORCE_CUDA="1", CUDA_HOME=str(sources))
    assert result.returncode != 0
    assert "FORCE_CUDA=1: " in result.stderr
    result = build(sources, "auto", FORCE_CUDA="perhaps")
    assert result.returncode != 0
    assert "expected 0 or 1" in result.stderr
