"""Options of all benchmarks, beside those of pytest-benchmark: see docs/benchmarks.md."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import sleep

import pytest
import torch

import fdcr_fast
from benchmarks.harness import Bench
from benchmarks.machine import Machine, watched
from benchmarks.tables import RESULTS, Tables

QUICK_CLIENTS, QUICK_PARAMS, QUICK_SECONDS = 12, 20_000, 0.05


def absolute(path: str) -> Path:
    return Path(path).resolve()


def pytest_addoption(parser):
    group = parser.getgroup("fdcr_fast")
    group.addoption("--threads", type=int, default=2, help="intra-op threads of every contender")
    group.addoption("--quick", action="store_true", help="small rounds and few repeats, to see that all runs")
    group.addoption("--refuse-busy", action="store_true", help="fail instead of measuring a busy machine")
    kept = {"dest": "results", "default": None}
    group.addoption("--write-results", action="store_const", const=RESULTS, help=f"write tables in {RESULTS}", **kept)
    group.addoption("--results", type=absolute, metavar="DIR", help="write the tables in this folder", **kept)


def pytest_configure(config):
    options = config.option
    if options.results is not None and options.benchmark_disable:
        raise pytest.UsageError("tables of what was measured cannot be written with --benchmark-disable")
    if options.results == RESULTS and options.quick:
        raise pytest.UsageError(f"{RESULTS} has no place for --quick: give another folder by --results=DIR")
    torch.set_num_threads(options.threads)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fdcr_fast"] = asdict(Machine.this())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["versions"] = {"fdcr_fast": fdcr_fast.__version__, "torch": torch.__version__}


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line at once, whatever pytest captures."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", end="", flush=True)

    return show


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest, say: Callable[[str], None]) -> Iterator[Tables]:
    if request.config.option.refuse_busy:
        with watched() as load:
            sleep(1)
        if busy := load.verdict(spread=0.0):
            pytest.exit(f"the machine is busy: {busy}", returncode=1)
    tables = Tables(request.config.option.results, say)
    yield tables
    tables.close()


@pytest.fixture(scope="session")
def sized(request: pytest.FixtureRequest) -> Callable[[int, int], tuple[int, int]]:
    """From clients and parameters to those that are measured: fewer with --quick."""
    if request.config.option.quick:
        return lambda K, P: (min(K, QUICK_CLIENTS), min(P, QUICK_PARAMS))
    return lambda K, P: (K, P)


@pytest.fixture
def bench(benchmark, request: pytest.FixtureRequest, tables: Tables) -> Bench:
    """Measures, and takes rows of the report of the test's module."""
    options = request.config.option
    return Bench(
        benchmark,
        QUICK_SECONDS if options.quick else float(options.benchmark_max_time),
        options.benchmark_min_rounds,
        options.refuse_busy,
        partial(tables.add, request.module.REPORT),
    )
