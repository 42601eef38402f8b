"""Options of all benchmarks: ``python -m pytest benchmarks --threads 2 --seconds 40``."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="intra-op threads of every contender")
    parser.addoption("--seconds", type=float, default=40.0, help="time for the repeats of one comparison")


@pytest.fixture(scope="session")
def seconds(request):
    return request.config.getoption("--seconds")


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))
