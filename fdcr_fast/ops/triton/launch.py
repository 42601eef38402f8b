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
        cache_bytes: Size of the cache that they share (L2).
    """

    multiprocessors: int
    cache_bytes: int


H100 = Target(132, 50 << 20)


def target(device: torch.device) -> Target:
    """Of the device; of an H100 where kernels are interpreted, or only compiled."""
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index) if _is_gpu(device) else H100


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.cache
def _of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.multi_processor_count, properties.L2_cache_size)


def power_of_two(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is not less than ``n``, within bounds that are powers of two."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


def blocks(size: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-size // block)


def splits(size: int, tiles: int, device: torch.device) -> int:
    """Into how many parts to cut a sum of ``size`` terms so that ``tiles`` sums keep the device busy."""
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
