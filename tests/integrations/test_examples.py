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
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "FLWR_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, FOLDER / script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(find_spec("ray") is None, reason="Flower's simulation is not installed")
def test_flower():
    found = {rule: (float(a), float(s)) for rule, a, s in LINE.findall(run("flower/run.py"))}
    assert min(accuracy for accuracy, _ in found.values()) > 85
    assert found["FedAvg"][1] > 50
    assert found["CoalitionFDCR"][1] < 10
