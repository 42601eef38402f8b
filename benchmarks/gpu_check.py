"""Checks every Triton kernel on a GPU against the reference in float64, and times it.

    python benchmarks/gpu_check.py

Without a GPU that the kernels run on it says what it would do, and exits with code 3.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import CASES, Make
from gpu_model import bytes_moved, predicted_seconds
from torch import Tensor
from torch.utils._pytree import tree_map

import fdcr_fast
from fdcr_fast.ops import reference

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


def main() -> int:
    status = fdcr_fast.backends()["triton"]
    if not status.usable or not torch.cuda.is_available():
        print(f"no GPU to check on: {status.reason}. With one, these would be compared with the reference and timed:")
        print("\n".join(f"- {case.name} ({case.operator})" for case in CASES))
        return NO_GPU
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| call | milliseconds | predicted for an H100 | GB/s | error |\n| --- | --- | --- | --- | --- |")
    wrong = []
    for case in CASES:
        args = case.arguments(maker("cuda"))
        operator, exact = getattr(torch.ops.fdcr_fast, case.operator), getattr(reference, case.operator)
        off = error(operator(*args), exact(*in_float64(args)))
        time, traffic = seconds(lambda: operator(*args)), bytes_moved(case.operator, args)  # noqa: B023
        expected = 1e3 * predicted_seconds(traffic)
        print(f"| {case.name} | {1e3 * time:.3f} | {expected:.3f} | {traffic.moved / time / 1e9:.0f} | {off:.1e} |")
        if not off < max((TOLERANCE.get(x.dtype, 1e-5) for x in args if isinstance(x, Tensor)), default=1e-2):
            wrong.append(case.name)
    print(f"\nwrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
