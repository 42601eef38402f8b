"""Checks every CUDA and Triton kernel on a GPU against the reference in float64, and times it; then local training.

    python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --predict     # prints what the models say of an H100, and needs none

Without a GPU that the kernels run on it says what it would do, and exits with code 3.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fdcr_fast
from fdcr_fast.ops.backends import with_kernels
from fdcr_fast.ops.operator import OPERATORS
from fdcr_fast.sim import SimulationConfig
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.run.federation import Federation
from tests.support.gpu import cuda_model, triton_model
from tests.support.gpu.cases import CASES, Make
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


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def maker(device: str) -> Make:
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).to(dtype)

    return make


def implementations() -> dict[str, tuple[Callable[[str], Any], Callable[..., Traffic]]]:
    """By backend: from an operator's name to its kernels, or None; and what they move."""
    found: dict[str, tuple[Callable[[str], Any], Callable[..., Traffic]]] = {}
    status = fdcr_fast.backends()
    if status["cuda"].usable:  # what the dispatcher finds
        kernels = {name: getattr(torch.ops.fdcr_fast, name) for name in with_kernels("cuda")}
        found["cuda"] = kernels.get, cuda_model.bytes_moved
    if status["triton"].usable and torch.cuda.is_available():
        from fdcr_fast.ops import triton

        found["triton"] = (lambda name: getattr(triton, name, None)), triton_model.bytes_moved
    return found


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


def training(device: str) -> float:
    """Prints how fast clients train together there; the largest error against clients that train by themselves."""
    expected, _ = uploads("cpu", 1)
    print("\n| clients at a time | clients/s | error |\n| --- | --- | --- |")
    errors = []
    for stack in (1, 16, 256):
        found, rate = uploads(device, stack)
        errors.append(error(found, expected))
        print(f"| {stack} | {rate:.0f} | {errors[-1]:.1e} |")
    return max(errors)


def main() -> int:
    if sys.argv[1:] == ["--predict"]:
        print(predictions(), end="")
        return 0
    backends = implementations()
    if not backends:
        reasons = {name: status.reason for name, status in fdcr_fast.backends().items() if name in ("cuda", "triton")}
        print(f"no GPU to check on: {reasons}. With one, these would be compared with the reference and timed:")
        print("\n".join(f"- {case.name} ({case.operator})" for case in CASES))
        return NO_GPU
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| call | backend | milliseconds | predicted for an H100 | GB/s | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    wrong = []
    for case in CASES:
        args = case.arguments(maker("cuda"))
        exact = OPERATORS[case.operator].reference(*in_float64(args))
        for backend, (find, model) in backends.items():
            if (operator := find(case.operator)) is None:
                continue
            off = error(operator(*args), exact)
            time, traffic = seconds(lambda: operator(*args)), model(case.operator, args)  # noqa: B023
            expected, rate = 1e3 * predicted_seconds(traffic, as_formed=backend == "cuda"), traffic.moved / time / 1e9
            print(f"| {case.name} | {backend} | {1e3 * time:.3f} | {expected:.3f} | {rate:.0f} | {off:.1e} |")
            if not off < max((TOLERANCE.get(x.dtype, 1e-5) for x in args if isinstance(x, Tensor)), default=1e-2):
                wrong.append(f"{case.name} ({backend})")
    if not training("cuda") < 1e-3:
        wrong.append("training")
    print(f"\nwrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
