"""Clients per second of whole simulators, each in processes of its own: ``python -m benchmarks.bench_simulator``, with
``--task resnet18`` or ``--task lstm`` of models that train by autograd.

Peers other than plain loops run in virtual environments under ``--environments``, which are made when they are not
there; that takes a package index once. They see this environment's torch instead of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.simulators.task import FULL, MIXED, TASKS
from benchmarks.tables import RESULTS, Report, Tables

HERE = Path(__file__).parent
# It needs a JAX of its time.
FEDJAX = ("fedjax", "jax==0.4.25", "jaxlib==0.4.25", "dm-haiku<0.0.13", "numpy<2", "scipy<1.13")
NAMES = {"cnn": "the paper's CNN", "resnet18": "ResNet-18", "lstm": "LEAF's LSTM"}
TEXT = """\
FedAvg of {model} on {name}: {clients} clients of {samples} samples, one epoch, batches of {batch}, SGD with
momentum. Measured is training and aggregation, without evaluation, starting and a first round of a tenth of the
clients. *clients/s* is the median over rounds and repeats, which take turns; *spread* the smallest and largest. *x* is
the rate of our row over that of the peer: one process of one thread is compared with one of ours, all others, which
have all cores, with one of ours per core. Every process has one thread, "threads" are those of one process, and FedJAX
takes what it wants. One process alone has its core's share of the clients. Of pfl and of naive loops in several
processes, one runs on each core, with such a share, and their rates are added. {more}"""
MORE = """\
FDCR's clients also compute and send a Fisher. Flower and naive FDCR, which are slow, run one timed round per repeat."""
PRECISIONS = f"""\
Rows of *{MIXED}* train under autocast in bfloat16 and are compared with ours that do so as well."""


@dataclass(frozen=True)
class Contender:
    """A script of ``simulators/`` with its arguments.

    Attributes:
        threads: Of one process, where the script heeds them.
        copies: How many run at once.
        share: It has one client of so many.
        packages: Of its own environment; none for a script that runs in this one.
        shares_torch: Whether the environment sees the packages of this one.
        most_rounds: Timed ones, for slow contenders.
        precision: What it trains in.
    """

    script: str
    threads: int
    arguments: tuple[str, ...] = ()
    copies: int = 1
    share: int = 1
    packages: tuple[str, ...] = ()
    shares_torch: bool = True
    most_rounds: int = 1000
    precision: str = FULL

    def python(self, environments: Path) -> str:
        """Of its environment, which is made if there is none."""
        if not self.packages:
            return sys.executable
        folder = environments / Path(self.script).stem
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            if self.shares_torch:
                site = subprocess.check_output(
                    [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
                ).strip()
                Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
            run([str(python), "-m", "pip", "install", "--quiet", *self.packages], timeout=1800)
            (folder / "complete").touch()
        return str(python)

    def measure(self, python: str, data: Path, rounds: int, clients: int, timeout: float) -> tuple[str, list[float]]:
        """Its version, and clients per second of every round."""
        command = [python, str(HERE / "simulators" / self.script), str(data)]
        clients //= self.share
        command += [str(min(rounds, self.most_rounds)), str(self.threads), str(clients), self.precision]
        with ThreadPoolExecutor(self.copies) as pool:
            outputs = list(pool.map(lambda _: run([*command, *self.arguments], timeout), range(self.copies)))
        found = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
        rates = zip(*([clients / seconds for seconds in each["seconds"]] for each in found), strict=True)
        return found[0]["version"], [sum(rate) for rate in rates]


RUNNING: set[int] = set()  # groups of processes


def _end(*_: object) -> None:
    """End, and all that runs for the benchmark with it."""
    for group in RUNNING:
        os.killpg(group, signal.SIGKILL)
    sys.exit(1)


def run(command: list[str], timeout: float) -> str:
    """What a command prints; a failure is a RuntimeError with the end of it. Its processes end with it."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    RUNNING.add(process.pid)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        RUNNING.discard(process.pid)
    if process.returncode != 0:
        raise RuntimeError((output.strip().splitlines() or ["no output"])[-1])
    return output


def report_of(name: str) -> Report:
    """A table of its own for each task; the first has the benchmark's name."""
    first, plain = next(iter(TASKS)), asdict(TASKS[name])
    command = "python -m benchmarks.bench_simulator"
    return Report(
        "simulator" if name == first else f"simulator_{name}",
        f"Simulators: clients per second{'' if name == first else f', {name}'}",
        command if name == first else f"{command} --task {name}",
        TEXT.format(**{**plain, "model": NAMES[name], "more": MORE if name == first else PRECISIONS}).rstrip(),
    )


def contenders(cores: int, task: str) -> dict[str, Contender]:
    """Rules that take Fishers, and what knows one model only, for the first task alone: larger models take minutes.

    Those are also trained in mixed precision, by the same loops under autocast.
    """

    def ours(server: str) -> dict[str, Contender]:
        return {
            f"fdcr_fast, {server}, {workers} process{'es' if workers > 1 else ''}": Contender(
                "ours.py", 1, (server.lower(), str(workers)), share=cores // workers
            )
            for workers in dict.fromkeys((1, cores))
        }

    pfl, on_each_core = ("pfl[pytorch]>=0.6",), {"copies": cores, "share": cores}
    common = ours("FedAvg") | {
        "naive, FedAvg, 1 process": Contender("naive.py", 1, share=cores),
        f"naive, FedAvg, {cores} threads": Contender("naive.py", cores),
        f"naive, FedAvg, {cores} processes": Contender("naive.py", 1, **on_each_core),
        "Flower": Contender("flower.py", 1, packages=("flwr[simulation]>=1.40",), most_rounds=1),
        f"pfl, {cores} processes": Contender("pfl_research.py", 1, packages=pfl, **on_each_core),
    }
    if task != next(iter(TASKS)):
        takes = "ours.py", "naive.py", "flower.py"
        mixed = {name: replace(one, precision=MIXED) for name, one in common.items() if one.script in takes}
        return common | {f"{name}, {MIXED}": one for name, one in mixed.items()}
    return (
        common
        | ours("FDCR")
        | {
            f"naive, FDCR, {cores} threads": Contender("naive_fdcr.py", cores, most_rounds=1),
            "pfl, 1 process": Contender("pfl_research.py", 1, packages=pfl, share=cores),
            "FedJAX": Contender("fedjax_peer.py", cores, packages=FEDJAX, shares_torch=False),
        }
    )


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default=next(iter(TASKS)), help="what is trained")
    parser.add_argument("--rounds", type=int, help="timed rounds of a process, by default the task's")
    parser.add_argument("--repeats", type=int, help="processes of every contender, which take turns")
    parser.add_argument("--only", action="append", help="part of a contender's name; may be given several times")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one process")
    parser.add_argument("--write-results", action="store_true", help=f"write the table in {RESULTS}")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "fdcr_fast" / "simulators")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)

    report, clients = report_of(options.task), TASKS[options.task].clients
    rounds, repeats = TASKS[options.task].rounds
    rounds, repeats = options.rounds or rounds, options.repeats or repeats
    cores = os.cpu_count() or 1
    chosen = {
        name: contender
        for name, contender in contenders(cores, options.task).items()
        if not options.only or any(part in name for part in options.only)
    }
    pythons: dict[str, str] = {}
    versions: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for name, contender in chosen.items():
        try:
            pythons[name] = contender.python(options.environments)
        except (subprocess.SubprocessError, OSError, RuntimeError) as error:  # noqa: PERF203 (one environment each)
            versions[name] = f"not installed: {error}"
            print(f"{name}: {versions[name]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        run(
            [sys.executable, str(HERE / "simulators" / "ours.py"), str(data), "0", "1", "0", FULL, options.task, "1"],
            options.timeout,
        )
        for _ in range(repeats):
            for name, python in list(pythons.items()):
                try:
                    versions[name], found = chosen[name].measure(python, data, rounds, clients, options.timeout)
                    rates[name] += found
                except (RuntimeError, ValueError, LookupError) as error:  # whatever the peer prints
                    versions[name] = f"failed: {error}"
                    del pythons[name]
                print(f"{name}: {', '.join(map(_short, rates[name]))} ({versions[name]})", flush=True)

    tables = Tables(RESULTS if options.write_results else None, print)
    medians = {name: statistics.median(found) for name, found in rates.items() if found}
    for name in chosen:
        server = "FDCR" if "FDCR" in name else "FedAvg"
        one = "1 process" in name
        suffix = f", {MIXED}" if chosen[name].precision == MIXED else ""
        processes = "1 process" if one or cores == 1 else f"{cores} processes"
        ours = medians.get(f"fdcr_fast, {server}, {processes}{suffix}")
        cells = {"simulator": name, "version": versions[name], "clients/s": "", "spread": "", "x": ""}
        if name in medians:
            cells["clients/s"] = _short(medians[name])
            cells["spread"] = f"{_short(min(rates[name]))} - {_short(max(rates[name]))}"
            if ours is not None:
                cells["x"] = f"{ours / medians[name]:.1f}"
        tables.add(report, name, cells, {"clients_per_second": rates[name]})


if __name__ == "__main__":
    main()
