"""Options of all benchmarks: ``python -m pytest benchmarks --threads 2 --seconds 40``."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness import RESULTS, Report


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="intra-op threads of every contender")
    parser.addoption("--seconds", type=float, default=40.0, help="time for the repeats of one comparison")
    parser.addoption("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.addoption("--quick", action="store_true", help="bench_limits: small sizes, to see that it runs")
    parser.addoption("--refuse-busy", action="store_true", help="bench_limits: no rows of a busy machine")


@pytest.fixture(scope="session")
def seconds(request):
    return request.config.getoption("--seconds")


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture(scope="session", autouse=True)
def results(request):
    Report.folder = request.config.getoption("--results")
