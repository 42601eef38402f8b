"""How kernels are launched, and on what: the only place that knows about devices and about the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Target:
    """What block sizes depend on.

    Attributes:
        multiprocessors: How many programs run side by side, at least.
        capability: Compute capability, 90 for 9.0.
    """

    multiprocessors: int
    capability: int


H100 = Target(132, 90)

# Of tensors that are on no GPU: where kernels are only compiled, or interpreted, one program after the other.
assumed = Target(2, 90) if INTERPRETED else H100


def target(device: torch.device) -> Target:
    """What block sizes of kernels on this device depend on."""
    return _of_gpu(device) if device.type == "cuda" else assumed


@functools.cache
def _of_gpu(device: torch.device) -> Target:
    found = torch.cuda.get_device_properties(device)
    return Target(int(found.multi_processor_count), 10 * int(found.major) + int(found.minor))


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is not less than ``n``, within bounds that are powers of two."""
    return min(max(1 << (n - 1).bit_length() if n > 1 else 1, least), most)


def blocks(size: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-size // block)


def splits(size: int, tiles: int, device: torch.device) -> int:
    """How many parts a sum of ``size`` terms is cut into, so that ``tiles`` sums keep the device busy."""
    return max(1, min(size, blocks(2 * target(device).multiprocessors, max(tiles, 1)), 256))


def in_order(partial: Tensor) -> Tensor:
    """The sum of partial results ``[splits, ...]``: of fixed shape, so always in the same order."""
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    kernel[grid](*args, **meta)


# Replaced to see what would be launched: by the byte counts and by the ahead-of-time compilation.
run: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] = _run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run the kernel on the current stream, if there is anything to run.

    Products and sums are not contracted to fused ones: variants of a kernel give the same bits where they compute the
    same.
    """
    if all(grid):
        run(kernel, grid, args, {"enable_fp_fusion": False, **meta})
