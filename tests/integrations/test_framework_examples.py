"""The examples run as the documentation says, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
LINE = re.compile(r"(\w+): accuracy ([\d.]+)%, attack success rate ([\d.]+)%")


def run(script, *arguments):
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("script", "needs"), [("flower/run.py", "ray"), ("nvflare/job.py", "nvflare")])
def test_the_defence_works_where_averaging_fails(script, needs):
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    found = {rule: (float(a), float(s)) for rule, a, s in LINE.findall(run(script))}
    assert min(accuracy for accuracy, _ in found.values()) > 85
    assert found["FedAvg"][1] > 50
    assert found["CoalitionFDCR"][1] < 10


def test_the_comparison_with_byzfl():
    if find_spec("byzfl") is None:
        pytest.skip("byzfl is not installed")
    rows = [line.split() for line in run("byzfl/compare.py", "--dim", "1000").splitlines()[1:]]
    assert len(rows) >= 16
    for attack, rule, ours, theirs, *_ in rows:
        if theirs != "-":
            assert float(ours) == pytest.approx(float(theirs), rel=1e-3), (attack, rule)
