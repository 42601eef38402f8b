"""The check on a GPU, as far as there is one: what it compares, and that nothing stops it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Check, attempted, checks, is_wrong, line
from benchmarks.gpu_versions import Versions
from benchmarks.rules import RULES
from benchmarks.supervised import results
from fdcr_fast.ops.operator import OPERATORS
from tests.support.gpu import cases

FINE = Versions("3.11.7", "0.2.0", "2.14.1", "13.0", "13.1", "3.8.0", "13.0", "NVIDIA H100", "9.0")

# Reports the numbers of its jobs, fails in the way of each, and prints what libraries print.
JOBS = """
import os, sys, time
from benchmarks.supervised import report
for job in range(int(sys.argv[1]), 6):
    print("compiling", job)
    if job == 1:
        print("illegal access", file=sys.stderr)
        os.abort()
    if job == 3:
        time.sleep(600)
    report({"job": job})
    if job == 4:
        break
"""


def test_a_job_that_crashes_or_hangs_does_not_stop_the_others():
    found = list(results(lambda first: [sys.executable, "-c", JOBS, str(first)], 6, limit=6))
    assert [result.get("job") for result in found] == [0, None, 2, None, 4, 5]
    assert "exit status -6: illegal access" in found[1]["failure"]
    assert found[3]["failure"] == "took longer than 6 s"


def test_a_process_that_never_reports_fails_every_job():
    found = list(results(lambda first: [sys.executable, "-c", "raise SystemExit(2)"], 2, limit=20))
    assert [result["failure"] for result in found] == ["the process ended with exit status 2: "] * 2


def test_a_check_that_raises_is_told_and_wrong():
    def fails():
        raise RuntimeError("no kernel image is available\nand more")

    check = Check("gram", "triton", fails)
    result = attempted(check)
    assert result == {"failure": "RuntimeError: no kernel image is available"}
    assert is_wrong(result)
    assert line(check, result).startswith("| gram | triton |")
    assert "no kernel image" in line(check, result)
    for off, wrong in ((1e-6, False), (1e-2, True), (float("nan"), True)):
        assert is_wrong({"error": off, "tolerance": 1e-5}) == wrong


def test_all_kernels_and_rules_are_compared():
    compared = {(check.name, check.way) for check in checks(["cuda", "triton"])}
    operators = {case.name: case.operator for case in cases.CASES}
    for backend in ("cuda", "triton"):
        kernels = {name for name, operator in OPERATORS.items() if backend in operator.gpu_kernels}
        assert {operators[name] for name, way in compared if way == backend} == kernels
    assert {(name, way) for name in RULES for way in ("tensors", "store", "pinned store")} <= compared
    assert {"diagonal_fisher", "training"} <= {name for name, _ in compared}


@pytest.mark.parametrize("name", ["FDCR", "CRFL"])
@pytest.mark.parametrize("way", gpu_check.WAYS)
def test_the_comparison_of_rules(name, way):
    result = gpu_check.rule_results(name, way, "cpu", K=8, P=2000)
    assert result["error"] == 0
    assert not is_wrong(result)


def test_the_comparison_of_operators(monkeypatch):
    monkeypatch.setattr(gpu_check, "kernel", lambda backend, name: OPERATORS[name])
    found = gpu_check.operator_results(cases.Case("gram", "gram", cases.gram("update", 5, 3000)), "cuda", "cpu")
    assert 0 < found["error"] < found["tolerance"]
    assert {"ms", "predicted ms", "GB/s"} <= found.keys()

    def arguments(make):
        rows = cases.clients(make, 2, 3000, torch.bfloat16, 16)[0][:, 0]
        return [make(3000)], rows, make(3, dtype=torch.float64)

    found = gpu_check.operator_results(cases.Case("fill_row", "fill_row", arguments), "triton", "cpu")
    assert 1e-4 < found["error"] < found["tolerance"]  # the rows in bfloat16


def test_results_are_written_to_be_sent_back(tmp_path, monkeypatch, capsys):
    found = [{"error": 1e-7, "tolerance": 1e-5, "ms": 0.25}, {"failure": "took longer than 180 s"}]
    monkeypatch.setattr(gpu_check, "results", lambda command, jobs, limit: iter(found))
    pending = [Check("gram", "cuda", dict), Check("gram", "triton", dict)]
    path = tmp_path / "gpu_check.json"
    assert gpu_check.checked(pending, FINE, path, 180) == 1
    written = json.loads(path.read_text())
    assert written["versions"]["gpu"] == "NVIDIA H100"
    assert [(row["way"], row["wrong"]) for row in written["results"]] == [("cuda", False), ("triton", True)]
    assert "wrong: gram (triton)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"driver_cuda": "12.4"}, "driver is too old: it runs CUDA 12.4, torch 2.14.1 needs 13.0"),
        ({"driver_cuda": None}, "no NVIDIA driver"),
        ({"torch_cuda": None}, "built without CUDA"),
        ({"triton": "3.4.0"}, "triton 3.4.0 is too old: its kernels need 3.5"),
        ({"triton": None}, "triton is not installed"),
        ({"capability": "7.5"}, "the GPU is too old: it has compute capability 7.5, the kernels need 8.0"),
        ({"nvcc": "12.8"}, "the CUDA toolkit is 12.8, torch was built with 13.0"),
        ({"nvcc": "12.6", "torch_cuda": "12.6"}, "the CUDA toolkit 12.6 is too old to compile for"),
    ],
)
def test_what_is_too_old_is_named(changed, said):
    (problem,) = replace(FINE, **changed).problems()
    assert said in problem


def test_nothing_is_said_of_what_fits():
    assert FINE.problems() == []
    assert replace(FINE, nvcc=None, triton="3.10.1+git1").problems() == []
    assert Versions.here().torch == torch.__version__
