"""Help and typos do not wait for PyTorch, and public names are there as if they had been imported from the start."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import fdcr_fast
from fdcr_fast.sim.study import SCALES, shipped_studies

MOST_SECONDS = 0.7  # of processor time; with PyTorch it takes four
COMMANDS = "info", "simulate", "study", "reproduce", "demo", "report"
PACKAGES = "fdcr_fast", "fdcr_fast.sim", "fdcr_fast.sim.study"


def processor_seconds(*command: str) -> tuple[float, int]:
    """What a command takes of the processor, and how it ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("FDCR_FAST_")}
    return subprocess.run([sys.executable, "-c", code], env={**own, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(params=["module", "script"])
def program(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "module":
        return [sys.executable, "-m", "fdcr_fast"]
    script = Path(sys.executable).with_name("fdcr-fast")
    if not script.exists():
        pytest.skip("fdcr_fast is not installed here")
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["simulate", "--help"], 0),
        (["rnu"], 2),
        (["simulate", "--rul", "X"], 2),
        (["simulate", "--server", "fdrc"], 1),
    ],
)
def test_help_and_typos_take_little_of_the_processor(program: list[str], arguments: list[str], code: int) -> None:
    seconds, codes = zip(*(processor_seconds(*program, *arguments) for _ in range(3)), strict=True)
    assert set(codes) == {code}
    assert min(seconds) < MOST_SECONDS


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_imports_no_pytorch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fdcr_fast", *arguments, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert imported.isdisjoint({"torch", "numpy", "matplotlib", "sklearn", "rich"})
    if not arguments:
        assert set(COMMANDS) <= set(done.stdout.split())
    if arguments == ["reproduce"]:
        text = "".join(done.stdout.split())  # names are broken where a line is full
        assert all(name in text for name in (*shipped_studies(), *SCALES))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_those_of_one_list(package: str) -> None:
    module: ModuleType = import_module(package)
    public = import_module(f"{package}._public")
    assert module.__all__ is public.__all__
    assert set(public.__all__) <= set(dir(module))
    for name in public.__all__:
        assert getattr(module, name) is getattr(public, name)
        assert find_spec(f"{package}.{name}") is None or isinstance(getattr(module, name), ModuleType), (
            "a module of the same name comes first"
        )
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nowhere'"):
        _ = module.nowhere


def test_names_are_found_in_every_way_though_nothing_was_imported() -> None:
    code = """if True:
        import sys, fdcr_fast
        assert "torch" not in sys.modules and fdcr_fast.__version__
        {use}
        import torch
        assert torch.ops.fdcr_fast.gram
    """
    for use in (
        "fdcr_fast.FDCR()",
        "from fdcr_fast import *; FDCR() and ops.gram",
        "assert 'FDCR' in dir(fdcr_fast)",
        "fdcr_fast.sim.simulate and fdcr_fast.sim.study.Study",
        "from fdcr_fast.sim import *; from fdcr_fast.sim.study import *; Study and simulate",
        f"import pickle; assert pickle.loads({pickle.dumps(fdcr_fast.FDCR())}) == fdcr_fast.FDCR()",
    ):
        assert python(code.format(use=use)).stderr == "", use


@pytest.mark.parametrize("module", ["ops.backends", "rules.table", "sim.study.results"])
def test_any_module_can_be_the_first(module: str) -> None:
    assert python(f"import fdcr_fast.{module}").stderr == ""


def test_operators_are_registered_at_once_where_pytorch_is_there() -> None:
    assert python("import torch, fdcr_fast; torch.ops.fdcr_fast.gram").stderr == ""


def test_an_import_fails_where_a_backend_that_was_asked_for_is_not_there() -> None:
    """Whether PyTorch has been imported or not."""
    for before in ("", "import torch; "):
        done = python(f"{before}import fdcr_fast", FDCR_FAST_BACKEND="abacus")
        assert "ImportError: FDCR_FAST_BACKEND='abacus': expected auto, cpu" in done.stderr
    assert python("import fdcr_fast; fdcr_fast.FDCR()", FDCR_FAST_BACKEND="reference").stderr == ""
