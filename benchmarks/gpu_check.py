"""Checks every CUDA and Triton kernel and every rule on a GPU against the CPU, and times them.

    python -m benchmarks.gpu_check               # in ten minutes: prints a table and writes gpu_check.json
    python -m benchmarks.gpu_check --predict     # prints what the models say of an H100, and needs none

What fails, crashes or hangs is told in the table, and the rest goes on. Without a GPU that the kernels run on it says
what is missing or too old and what it would do, and exits with code 3.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fdcr_fast
from benchmarks.gpu_versions import Versions
from benchmarks.plain_rules import relative_error
from benchmarks.rounds import filled, stacked
from benchmarks.rules import ATTACKERS, RULES
from benchmarks.supervised import report, results
from fdcr_fast import UpdateStore
from fdcr_fast.ops.backends import with_kernels
from fdcr_fast.ops.operator import OPERATORS
from tests.support.gpu import cuda_model, triton_model
from tests.support.gpu.cases import CASES, Case, Make
from tests.support.gpu.traffic import Traffic, predicted_seconds

NO_GPU = 3
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of results in these types; else float32 sums


def error(found: Any, exact: Any) -> float:
    """The largest relative error of the results, each measured by its norm."""
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (found, exact)), strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item() for a, b in pairs]
    return max(errors)


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)


def seconds(call: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Median seconds of a call: on a GPU from its begin to its end there."""
    if device == "cpu":
        return statistics.median(_on_host(call) for _ in range(repeats))
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def _on_host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def maker(device: str) -> Make:
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).to(dtype)

    return make


Results = dict[str, float]  # "error" and "tolerance", and what was timed


@dataclass(frozen=True)
class Check:
    """One comparison, by what is compared and how it is done there."""

    name: str
    way: str
    run: Callable[[], Results]


def kernel(backend: str, operator: str) -> Callable[..., Any]:
    """An operator by the kernels of one backend; by ``cuda`` whatever the dispatcher finds."""
    if backend == "triton":
        found: Callable[..., Any] = getattr(importlib.import_module("fdcr_fast.ops.triton"), operator)
        return found
    dispatched: Callable[..., Any] = getattr(torch.ops.fdcr_fast, operator)
    return dispatched


MODELS: dict[str, Callable[..., Traffic]] = {"cuda": cuda_model.bytes_moved, "triton": triton_model.bytes_moved}


def operator_results(case: Case, backend: str, device: str) -> Results:
    """The error beside the CPU in float64, and the time beside what the model predicts of an H100."""
    args = case.arguments(maker(device))
    there = tree_map(on_cpu, in_float64(args))
    exact = OPERATORS[case.operator](*there)
    operator = kernel(backend, case.operator)
    found = tree_map(on_cpu, operator(*args))
    if case.operator == "fill_row":  # which is about what it writes
        exact, found = (exact, there[1]), (found, args[1].cpu())
    types = [TOLERANCE.get(x.dtype, 1e-5) for x in args if isinstance(x, Tensor)]
    traffic, took = MODELS[backend](case.operator, args), seconds(lambda: operator(*args), device)
    return {
        "error": error(found, exact),
        "tolerance": max(types, default=1e-2),
        "ms": 1e3 * took,
        "predicted ms": 1e3 * predicted_seconds(traffic, as_formed=backend == "cuda"),
        "GB/s": traffic.moved / took / 1e9,
    }


def on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


# Where the clients of a round are for a rule that runs on the device; in all of them, with Fishers.
WAYS = ("tensors", "store", "pinned store")


def rule_results(name: str, way: str, device: str, K: int = 20, P: int = 1_000_000) -> Results:
    """The error of the step, and the time of the whole round; it fails where other clients are kept than on the CPU."""
    w, n, updates, fishers = stacked(K, P)
    make = partial(RULES[name], int(ATTACKERS * K))
    expected = make().aggregate(w, updates, fishers, n)
    there = w.to(device)
    if way == "tensors":
        run = partial(make().aggregate, there, updates.to(device), fishers.to(device), n)
    else:
        place = {"device": device} if way == "store" else {"compute_device": device}
        run = partial(make().aggregate, there, filled(UpdateStore(P, K, **place), n, updates, fishers))
    result = run()
    if not torch.equal(result.kept, expected.kept):
        raise RuntimeError(f"keeps {result.kept_clients}, and on the CPU {expected.kept_clients}")
    off = relative_error(result.params.cpu(), expected.params.double(), w)
    return {"error": off, "tolerance": 1e-3, "ms": 1e3 * seconds(run, device, repeats=5)}


def fisher_results(device: str) -> Results:
    """The error of a diagonal Fisher, and its time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(784, 10)
    )
    batch = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    expected = fdcr_fast.diagonal_fisher(model, batch)
    model.to(device)
    there = tuple(x.to(device) for x in batch)
    found = fdcr_fast.diagonal_fisher(model, there)
    took = seconds(lambda: fdcr_fast.diagonal_fisher(model, there), device)
    return {"error": error(found.cpu(), expected), "tolerance": 1e-3, "ms": 1e3 * took}


# Limited by memory, or by products of float32: what else may limit the others is not in the models.
PREDICTED = (
    "discrepancy_and_mean, tiles of 16",
    "discrepancy_and_mean, tiles of 16, bfloat16",
    "importance_range, [K, P]",
    "gram, update",
    "gram, fisher_update",
    "linear, 128 positions",
    "convolution 3x3",
    "LayerNorm",
    "GroupNorm, large groups",
)


def shapes(*args: Any) -> str:
    return ", ".join(f"{str(x.dtype)[6:]} {list(x.shape)}" for x in args if isinstance(x, Tensor) and x.dim() > 1)


def predictions() -> str:
    """The table in docs/gpu.md: by the models alone, on tensors without data."""
    lines = ["| call | operands | MB moved | Triton, ms | CUDA, ms |", "| --- | --- | --- | --- | --- |"]

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for case in CASES:
        if case.name in PREDICTED:
            args = case.arguments(make)
            traffic, cuda = triton_model.bytes_moved(case.operator, args), "-"
            if case.operator in with_kernels("cuda"):
                formed = cuda_model.bytes_moved(case.operator, args)
                cuda = f"{1e3 * predicted_seconds(formed, as_formed=True):.3f}"
            milliseconds = f"{1e3 * predicted_seconds(traffic):.3f}"
            cells = case.name, shapes(*args[:3]), f"{traffic.moved / 1e6:.0f}", milliseconds, cuda
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def uploads(device: str, stack: int) -> tuple[Tensor, float]:
    """Updates of 256 clients with 7 digits each, and how many train per second where they train together."""
    # Here: the rest needs none of the packages that the simulator does.
    from fdcr_fast.sim import SimulationConfig
    from fdcr_fast.sim.clients.work import LocalWork
    from fdcr_fast.sim.costs import Stopwatch
    from fdcr_fast.sim.run.federation import Federation

    config = SimulationConfig(
        dataset="digits", clients=256, split="dirichlet-mix", samples_per_client=7, malicious=0, attack="none",
        local_epochs=4, batch_size=4, device=device, stack=stack,
    )  # fmt: skip
    federation = Federation(config)
    for _ in range(2):
        work = LocalWork(config, federation.classifier, Stopwatch(), 1, federation.initial_params, None)
        federation.collect(work)
    updates = torch.stack([sent.update for sent in federation.store])
    return updates, config.clients / work.clock.seconds["training"]


def training_results(stack: int, device: str) -> Results:
    """The error of so many clients that train together beside clients that train by themselves on the CPU."""
    expected, _ = uploads("cpu", 1)
    found, rate = uploads(device, stack)
    return {"error": error(found.cpu(), expected), "tolerance": 1e-3, "clients/s": rate}


def checks(backends: Sequence[str], device: str = "cuda") -> list[Check]:
    """All comparisons; those of kernels by every backend that has one."""
    found = [
        Check(case.name, backend, partial(operator_results, case, backend, device))
        for case in CASES
        for backend in backends
        if case.operator in with_kernels(backend)
    ]
    found += [Check(name, way, partial(rule_results, name, way, device)) for name in RULES for way in WAYS]
    found.append(Check("diagonal_fisher", "CNN", partial(fisher_results, device)))
    found += [
        Check("training", f"{stack} at a time", partial(training_results, stack, device)) for stack in (1, 16, 256)
    ]
    return found


def attempted(check: Check) -> dict[str, Any]:
    """The results of a check, or why it has none."""
    try:
        return dict(check.run())
    except Exception as failure:  # of any compiler or driver
        return {"failure": f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"}


def work(pending: Sequence[Check]) -> None:
    """Does the checks in this process, up to one after which the GPU answers no more."""
    for check in pending:
        report(attempted(check))
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:  # an illegal access is the end of a process
            return


def is_wrong(result: dict[str, Any]) -> bool:
    return "failure" in result or not result["error"] < result["tolerance"]


COLUMNS = ("ms", "predicted ms", "GB/s", "clients/s", "error")


def line(check: Check, result: dict[str, Any]) -> str:
    numbers = [f"{result[column]:.3g}" if column in result else "" for column in COLUMNS]
    said = result.get("failure") or ("WRONG" if is_wrong(result) else "")
    return f"| {' | '.join([check.name, check.way, *numbers, said])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="print what the models say of an H100")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where the results go")
    parser.add_argument("--limit", type=float, default=180, help="seconds that one check may take")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # do the checks from this number on
    options = parser.parse_args()
    if options.predict:
        print(predictions(), end="")
        return 0
    status = fdcr_fast.backends()
    backends = [name for name in ("cuda", "triton") if status[name].usable and torch.cuda.is_available()]
    if options.worker is not None:
        work(checks(backends)[options.worker :])
        return 0
    versions = Versions.here()
    print("; ".join(f"{name} {value}" for name, value in asdict(versions).items()))
    for problem in versions.problems():
        print(f"- {problem}")
    if not backends:
        reasons = {name: status[name].reason for name in ("cuda", "triton")}
        print(f"no GPU to check on: {reasons}. With one, these would be compared with the CPU and timed:")
        print("\n".join(f"- {check.name} ({check.way})" for check in checks(["cuda", "triton"])))
        return NO_GPU
    return checked(checks(backends), versions, options.json, options.limit)


def checked(pending: Sequence[Check], versions: Versions, path: Path, limit: float) -> int:
    """Prints and writes the results of all checks, each as soon as it is there."""
    print(f"\n| what | how | {' | '.join(COLUMNS)} | |\n|{' --- |' * (len(COLUMNS) + 3)}")
    written: dict[str, Any] = {"versions": asdict(versions), "problems": versions.problems(), "results": []}
    wrong = []

    def command(first: int) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu_check", "--worker", str(first)]

    for check, result in zip(pending, results(command, len(pending), limit), strict=True):
        print(line(check, result), flush=True)
        written["results"].append({"name": check.name, "way": check.way, "wrong": is_wrong(result), **result})
        path.write_text(json.dumps(written, indent=1) + "\n")
        if is_wrong(result):
            wrong.append(f"{check.name} ({check.way})")
    print(f"\nwrong: {', '.join(wrong) or 'none'}\n{path} has all of it: please send it back")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
