"""The sources of the CUDA kernels on the host: what they compute, what they move, and whether they race."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdcr_fast import _native
from fdcr_fast.ops.backends import with_kernels
from tests.cuda_on_host.on_host import build, run, sanitized

ROOT = Path(__file__).parents[2]
CHECK = Path(__file__).with_name("check.py")

# 1e-19: its square has few bits left in TF32. Cuts: not the same bits, as documented. Others take long.
LEFT_OUT = "1e-19", "cut", "70-33-64", "cuda-513", "cuda-300", "cuda-900", "many_parameters", "90-17-260"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Threads take turns as fibers: fast."""
    return build(tmp_path_factory.mktemp("fibers"), "-DFDCR_FIBERS")


def test_they_pass_the_tests_of_all_implementations(library):
    files = [f"tests/ops/test_{name}.py" for name in ("aggregation", "squared_grads", "gram")]
    chosen = " and ".join(["cuda", *(f"not {name}" for name in LEFT_OUT)])
    result = run("-m", "pytest", *files, "-p", "no:warnings", "-k", chosen, FDCR_CUDA_ON_HOST=str(library))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    assert "passed" in result.stdout


def test_small_awkward_calls_are_right_and_move_what_the_model_says(library):
    result = run(CHECK, library, "values", "counts")
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    assert "values are right" in result.stdout
    assert "calls move what the model says" in result.stdout


def test_threads_do_not_race(tmp_path):
    library, preload = sanitized(tmp_path, "thread", ["tsan"])
    env = {"LD_PRELOAD": preload, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    result = run(CHECK, library, "values", "race", **env)  # the first race ends the process
    assert "values are right" in result.stdout, result.stdout + result.stderr[-5000:]
    assert result.returncode == 66, result.stderr[-3000:]
    assert "data race" in result.stderr
    assert "racing" in result.stderr


def test_threads_stay_inside_their_memory(tmp_path):
    library, preload = sanitized(tmp_path, "address,undefined", ["asan", "ubsan"])
    env = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    result = run(CHECK, library, "values", **env)
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    assert "values are right" in result.stdout


def test_every_operator_has_kernels_or_is_left_to_others(library):
    code = (
        f"import torch, fdcr_fast; torch.ops.load_library({str(library)!r}); "
        "from fdcr_fast.ops.operator import OPERATORS; has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*sorted(name for name in OPERATORS if has(f'fdcr_fast::{name}', 'CPU')))"
    )
    assert run("-c", code).stdout.split() == sorted(with_kernels("cuda"))


def test_memory_bound_kernels_move_little_more_than_they_must():
    from tests.support.gpu.cases import CASES
    from tests.support.gpu.cuda_model import MODELS, bytes_moved

    def make(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    assert set(MODELS) == with_kernels("cuda")
    for case in CASES:
        if case.operator in MODELS:
            traffic = bytes_moved(case.operator, case.arguments(make))
            assert traffic.products or traffic.moved <= 1.05 * traffic.least, case.name


def test_a_choice_that_cannot_be_honoured_raises():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    env = {**os.environ, "FDCR_FAST_BACKEND": "cuda"}
    command = [sys.executable, "-c", "import fdcr_fast"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    reason = _native.cuda_reason if _native.cuda is None else "PyTorch finds no CUDA device"
    assert f"FDCR_FAST_BACKEND=cuda: {reason}" in result.stderr
