"""The kernels in Triton's interpreter, which takes processes of its own: what they compute, and what they move."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdcr_fast.ops.backends import with_kernels

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]


def interpreted(*command, **env):
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    return result.stdout


# What takes long because the interpreter goes through programs one by one.
SLOW = (
    "large_convolutions",
    "test_large",
    "every_narrow",
    "triton-900",
    "[triton-3]",
    "-1000]",
    "-257]",
    "-100]",
    "-64]",
)
SLOW += "dtype2-600", "dtype3-600"  # float32 and float64 stay: others are float32 once loaded
FILES = [
    f"tests/ops/test_{name}.py"
    for name in ("aggregation", "central_mean", "embedding_grads", "fill_row", "gram", "norm_grads", "squared_grads")
]
CHOSEN = " and ".join(
    ["triton", *(f"not {name}" for name in SLOW), "(not test_gram or nobody or undefined or every_transform)"]
)


def test_they_pass_the_tests_of_all_implementations():
    assert "passed" in interpreted("-m", "pytest", *FILES, "-p", "no:warnings", "-k", CHOSEN)


def test_the_dispatcher_reaches_them():
    """The same through ``torch.ops``, where they take the place of the compiled kernels: schemas, fakes, tracing."""
    output = interpreted(
        "-m", "pytest", "tests/ops/test_registration.py", "-p", "no:warnings", "-k", "opcheck",
        FDCR_FAST_BACKEND="triton",
    )  # fmt: skip
    assert "passed" in output


def test_every_operator_has_a_kernel_or_is_left_to_the_reference():
    from fdcr_fast.ops import triton as kernels

    assert set(kernels.__all__) == with_kernels("triton")
    code = (
        "import torch, fdcr_fast; from fdcr_fast.ops.operator import OPERATORS; "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*sorted(name for name in OPERATORS if has(f'fdcr_fast::{name}', 'CPU')))"
    )
    assert interpreted("-c", code, FDCR_FAST_BACKEND="triton").split() == sorted(kernels.__all__)


def test_they_move_the_bytes_of_the_model():
    assert "calls move what the model says" in interpreted("tests/triton_kernels/count_bytes.py")


def test_memory_bound_kernels_move_little_more_than_they_must():
    from tests.support.gpu.cases import CASES
    from tests.support.gpu.triton_model import bytes_moved

    def make(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for case in CASES:
        traffic = bytes_moved(case.operator, case.arguments(make))
        if not traffic.products and case.name != "GroupNorm, large groups":  # whose input is read a second time
            assert traffic.moved <= 1.05 * traffic.least, case.name


def test_a_choice_that_cannot_be_honoured_raises():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    env = {**os.environ, "FDCR_FAST_BACKEND": "triton"}
    env.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", "import fdcr_fast"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "FDCR_FAST_BACKEND=triton: " in result.stderr


def test_the_check_on_a_gpu_says_what_it_would_do_without_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert "gram, update" in result.stdout


def test_the_predictions_in_the_documentation_are_those_of_the_models():
    from benchmarks.gpu_check import PREDICTED, predictions

    assert predictions() in (ROOT / "docs" / "gpu.md").read_text()
    assert predictions().count("\n") == 2 + len(PREDICTED)
