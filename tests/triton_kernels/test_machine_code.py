"""What the kernels become for GPUs, read from machine code: in a process where Triton compiles, not interprets."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parents[2]
OF_CLIENTS = {"aggregate", "client_statistics", "fill", "sorted_mean", "selected_mean"}
MEMORY_BOUND = OF_CLIENTS | {"squared_norm_grads", "norm_statistics", "squared_sums"}
MATRIX = {"squared_grads", "inner_products"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every kernel for capability 9.0, and for 8.0 and 10.0 matrix products: there tiles or instructions differ."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    env.pop("TRITON_INTERPRET", None)
    report = [sys.executable, "-m", "benchmarks.triton_report", "--json", "--capability"]
    options = ["90", "--only", "^(?!.*(K = |, float16))"], ["80", "100", "--only", "fisher_update|^convolution 3x3$"]

    def run(chosen):
        return subprocess.run([*report, *chosen], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    found = []
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, options):
            assert result.returncode == 0, result.stderr[-3000:]
            found += json.loads(result.stdout)
    return found


def test_every_kernel_is_there(rows):
    assert {row["kernel"] for row in rows} == MEMORY_BOUND | MATRIX | {"squared_embedding_grads"}
    assert {row["capability"] for row in rows} == {80, 90, 100}


def test_nothing_spills_and_a_program_fits_on_a_multiprocessor(rows):
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= 99 << 10, row  # of 164 KiB and more; a single program could have 163


def test_memory_is_read_in_vectors(rows):
    """128 bits for each thread and load of the clients' numbers."""
    for row in rows:
        if row["kernel"] in MEMORY_BOUND and row["case"] != "linear, one position":
            assert row["loads"].get("128", 0) > 0, row
        if row["kernel"] in OF_CLIENTS:
            assert row["loads"].get("32 or less", 0) <= 1, row


def test_products_run_on_tensor_cores(rows):
    for row in rows:
        assert bool(row["tensor_core"]) == (row["kernel"] in MATRIX), row
    kinds = {row["case"]: row["tensor_core"] for row in rows if row["capability"] == 90 and row["tensor_core"]}
    assert "TF32" in kinds["linear, 128 positions"]
    assert "BF16" in kinds["linear, bfloat16"]


def test_the_table_in_the_repository_is_of_these_calls():
    table = (ROOT / "benchmarks" / "results" / "triton.md").read_text()
    from tests.support.gpu.cases import CASES

    assert all(f"| {case.name} |" in table for case in CASES)
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert cells
    assert all(row[6] == "0" for row in cells)
