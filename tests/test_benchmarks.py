"""The benchmark of the limits: that it runs, and that it says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import phases
from benchmarks.harness import Times
from benchmarks.machine import Load, watched
from benchmarks.targets import Target, summary, verdict
from fdcr_fast import FDCR, FedAvg, UpdateStore

ROOT = Path(__file__).parents[1]


def test_the_limits_are_measured_in_one_command(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_limits.py", "--quick", "--threads", "1"]
    command += ["--results", tmp_path, "-k", "not whole_rounds or 10x1000000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "limits.json").read_text())["rows"]
    for name in ("raw read, 1 threads", "FDCR, store", "FDCR, bfloat16 store", "put, one thread", "FLAME, tensors"):
        assert any(key.startswith(name) for key in rows), name
    assert "one reading" in rows["FDCR, store, K = 12, P = 20,000"]["figures"]["phases"]
    table = (tmp_path / "limits.md").read_text()
    closing = table[table.index("targets reached") :]
    assert "targets reached" in result.stdout
    assert "The machine was" in closing


def test_bounds_and_verdicts():
    ours, yardstick = Times((2.0, 2.0, 4.0)), Times((1.0, 1.0, 1.0))
    assert Target(0.6).measured(ours, yardstick) == (0.5, 0.375, 0.5)
    assert Target(1.0, "multiple").measured(ours, yardstick) == (2, 2, 3)
    assert Target(0.3, "ms").measured(Times((1e-3, 1e-3)), yardstick) == (1, 1, 1)
    assert Target(0.6).excess(0.5) == pytest.approx(1.2)
    assert Target(1.0, "multiple").excess(2.0) == 2
    assert [str(Target(0.6)), str(Target(3, "ms"))] == [">= 0.6", "<= 3 ms"]
    assert verdict(0.9, {"mean": 1.0}) == "reached"
    assert verdict(1.2, {"mean": 1.0, "guess": 3.0}) == "missed: 1.20 x the time, 75 % of it guess"


def test_the_summary_names_what_was_missed_and_whether_the_machine_was_busy():
    rows = {
        "a": {"excess": 0.8, "busy": ""},
        "b": {"excess": 1.3, "busy": ""},
        "c": {"excess": 2.0, "busy": "others 0.7 cores"},
        "raw read": {"busy": ""},
    }
    text = summary(rows)
    assert "1 of 3 targets reached" in text
    assert "c (2.00 x); b (1.30 x)" in text
    assert "busy in 1 of 4 rows" in text
    assert "idle" in summary({"a": rows["a"]})


@pytest.mark.parametrize("rule", [FDCR(), FedAvg()], ids=["FDCR", "FedAvg"])
def test_phases_add_up_and_leave_the_library_as_it_was(rule):
    before = [vars(owner)[name] for _, owner, name in phases.POINTS]
    store = UpdateStore(20_000, 6)
    for k in range(6):
        store.put(torch.randn(20_000) * (1 + 9 * (k == 0)), torch.rand(20_000), 1)
    w = torch.zeros(20_000)
    walls = []

    def run():
        start = time.perf_counter()
        rule.aggregate(w, store)
        walls.append(time.perf_counter() - start)

    found = phases.phases(run, 1)
    assert {"take in", "screen", "result", "weigh", phases.REST} <= found.keys()
    assert ("guess" in found) == isinstance(rule, FDCR)
    assert min(found.values()) >= 0
    assert sum(found.values()) >= walls[0] * (1 - 1e-6)
    assert [vars(owner)[name] for _, owner, name in phases.POINTS] == before


def test_a_busy_machine_is_told():
    load = Load()
    assert load.verdict(spread=0.05) == ""
    load.others = 0.7
    assert load.verdict(spread=0.5) == "others 0.7 cores, yardstick ± 25 %"
    with watched() as load:
        pass
    assert load.others >= 0
