"""What nvcc makes of the CUDA kernels, read from machine code; and that they become the extension. No GPU is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fdcr_fast.ops.backends import with_kernels

ROOT = Path(__file__).parents[2]
CAPABILITIES = {80, 90, 100}
AGGREGATION, MATRIX = {"aggregation", "client_statistics"}, {"inner_products", "squared_grads_tile"}
OTHERS = {"row_reduction", "mirror"}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="no sources: not a checkout"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def rows(objects):
    pytest.importorskip("triton", reason="cuobjdump comes with the package triton")
    command = [sys.executable, "-m", "benchmarks.cuda_report", "--json", "--objects", objects]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


def name(row):
    return re.match(r"\w+", row["kernel"])[0]


def test_every_kernel_is_there_for_every_capability(rows):
    assert {name(row) for row in rows} == AGGREGATION | MATRIX | OTHERS
    kernels = {row["kernel"] for row in rows}
    assert {(row["kernel"], row["capability"]) for row in rows} == {(k, c) for k in kernels for c in CAPABILITIES}


def test_nothing_spills_and_two_blocks_fit_on_a_multiprocessor(rows):
    for row in rows:
        assert row["spills"] == 0, row
        assert 2 * 128 * row["registers"] <= 65536, row
        assert row["shared"] <= 48 << 10, row


def test_clients_are_read_in_vectors(rows):
    for row in rows:
        if name(row) in AGGREGATION and "Vectors" in row["kernel"]:
            assert row["loads"]["128"] > 0, row
        if name(row) == "client_statistics" and "Vectors" in row["kernel"]:
            assert row["loads"]["64"] == row["loads"]["32 or less"] == 0, row


def test_products_run_on_matrix_units(rows):
    for row in rows:
        wide = "double" in row["kernel"]
        kinds = {instruction.split(".")[0] for instruction in row["matrix"]}
        assert kinds == ({"DMMA" if wide else "HMMA"} if name(row) in MATRIX else set()), row
        assert all("TF32" in instruction for instruction in row["matrix"] if not wide), row


def test_the_table_in_the_repository_is_of_these_kernels(rows):
    table = (ROOT / "benchmarks" / "results" / "cuda.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert {(row[0], float(row[1])) for row in cells} == {(row["kernel"], row["capability"] / 10) for row in rows}
    assert all(row[4] == "0" for row in cells)


def test_the_kernels_become_an_extension(rows, objects):
    """Linked as setup.py does, which compiles them once more: it registers its operators without a GPU."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch was built without CUDA")
    pybind11 = pytest.importorskip("pybind11")
    top = re.search(
        r"TOP=(.+)",
        subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr,
    )
    home, library = Path(top[1].strip()), Path(torch.__file__).parent
    target = objects / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_path("include"), home / "include", ROOT / "csrc"]
    command = [
        "g++",
        "-shared",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        *(f"-I{path}" for path in includes),
    ]
    command += ["-isystem", library / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ['-DFDCR_TORCH_VERSION="x"', '-DFDCR_CUDA_ARCHITECTURES="8.0"', *objects.glob("*.o")]
    command += [ROOT / "csrc/cuda/operators.cpp", ROOT / "csrc/cuda/module.cpp", "-o", target]
    command += [
        f"-L{library / 'lib'}",
        f"-L{home / 'lib64'}",
        "-ltorch",
        "-ltorch_cpu",
        "-ltorch_cuda",
        "-lc10",
        "-lcudart",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    code = (
        "import torch, fdcr_fast, _cuda; "
        "from fdcr_fast.ops.operator import OPERATORS; has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*sorted(name for name in OPERATORS if has(f'fdcr_fast::{name}', 'CUDA')))"
    )
    env = {**os.environ, "FDCR_FAST_BACKEND": "reference", "PYTHONPATH": f"{objects}{os.pathsep}{ROOT}"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.stdout.split() == sorted(with_kernels("cuda")), result.stderr
