"""Building with and without what it needs, in a copy of the sources."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

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


def build(sources, mode, command=("build", "--build-lib", "out"), **env):
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=sources,
        env={**os.environ, "FDCR_FAST_BUILD": mode, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def built(sources):
    assert (sources / "out" / "fdcr_fast" / "__init__.py").exists()
    return sorted(path.name for path in (sources / "out" / "fdcr_fast").glob("*.so"))


NO_COMPILER = {"CC": "false", "CXX": "false"}
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def pretended(sources, fails_at="nothing"):
    """A compiler that makes empty files, and fails at one source."""
    script = sources / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> calls\ncase "$*" in *{fails_at}*) exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script), "FORCE_CUDA": "0"}


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


def test_a_library_of_operators_and_a_module_for_this_python(sources):
    result = build(sources, "require", **pretended(sources))
    assert result.returncode == 0, result.stderr
    assert built(sources) == [MODULE, "libfdcr_fast.so"]
    links = [line for line in (sources / "calls").read_text().splitlines() if " -shared " in line]
    assert ["-lfdcr_fast" in line for line in links] == [False, True]
    assert ["-ltorch" in line for line in links] == [True, False]


def test_an_editable_installation_has_both_among_the_sources(sources):
    result = build(sources, "require", ("editable_wheel", "--dist-dir", "out"), **pretended(sources))
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (sources / "fdcr_fast").glob("*.so")) == [MODULE, "libfdcr_fast.so"]


def test_auto_goes_on_after_a_compile_error_with_all_or_nothing(sources):
    result = build(sources, "auto", **pretended(sources, fails_at="csrc/module.cpp"))
    assert result.returncode == 0, result.stderr
    assert " -shared " in (sources / "calls").read_text()
    assert built(sources) == []
    assert "without its compiled kernels" in result.stderr


def test_a_wheel_for_all_pythons_holds_the_modules_of_those_named(sources):
    """Another interpreter is this one with another name for its modules."""
    other = sources / "python"
    told = '["-other.so", "/other/include"]'
    other.write_text(f"#!/bin/sh\necho '{told}'\n")
    other.chmod(0o755)
    environment = pretended(sources) | {"FDCR_FAST_PYTHONS": f"{sys.executable} {other}"}
    result = build(sources, "require", ("bdist_wheel", "--dist-dir", "out"), **environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = (sources / "out").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        names = {Path(name).name for name in files.namelist() if name.endswith(".so")}
    assert names == {"libfdcr_fast.so", MODULE, "_C-other.so"}
    assert "-I/other/include " in (sources / "calls").read_text()


def test_cuda_that_is_asked_for_and_cannot_be_built_fails_with_the_reason(sources):
    result = build(sources, "auto", FORCE_CUDA="1", CUDA_HOME=str(sources))
    assert result.returncode != 0
    assert "FORCE_CUDA=1: " in result.stderr
    result = build(sources, "auto", FORCE_CUDA="perhaps")
    assert result.returncode != 0
    assert "expected 0 or 1" in result.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
def test_the_cuda_kernels_are_an_extension_beside_the_others(sources):
    toolkit = sources / "toolkit"
    for part in ("bin", "include"):
        (toolkit / part).mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    environment = pretended(sources) | {"FORCE_CUDA": "1", "CUDA_HOME": str(toolkit)}
    compiler = (sources / "compiler").read_text()
    version = f'case "$1" in --version) echo release {torch.version.cuda},; exit;; esac'
    (toolkit / "bin" / "nvcc").write_text(compiler.replace("#!/bin/sh", f"#!/bin/sh\n{version}"))
    (toolkit / "bin" / "nvcc").chmod(0o755)
    result = build(sources, "require", **environment)
    assert result.returncode == 0, result.stderr
    assert built(sources) == [MODULE, MODULE.replace("_C", "_cuda"), "libfdcr_fast.so"]
    calls = (sources / "calls").read_text().splitlines()
    assert sum(".cu -o" in line for line in calls) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    (link,) = [line for line in calls if "-ltorch_cuda" in line]
    assert "_cuda" in link


def test_pythons_for_wheels_are_those_that_run(tmp_path):
    """One of each version; make takes an exit code of 127, that of the last one asked, for no answer at all."""
    answers = {"given": "echo 12 /given", "python3.12": "echo 12 /another", "python3.10": "echo 10 /first"}
    for name, answer in {**answers, "python3.13": "exit 127", "python3.14": "exit 127"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Makefile").write_text(f"all:\n\t@echo $(shell {ROOT / '.ci' / 'find-pythons'} {tmp_path / 'given'})\n")
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["make"], cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert [each for each in found if "python3" not in each] == ["/first", "/given"]
    assert done.stderr == ""
