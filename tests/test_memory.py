"""Large tensors in memory of their own."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from fdcr_fast.memory import empty, pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [(0,), (3, 0, 2), (5,), (1024, 4), (7, 3, 50_001), (3, 1 << 20)])
def test_an_empty_tensor_is_one_that_can_be_written(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [empty(size, dtype, lasting=lasting) for lasting in (False, True)]
    for number, tensor in enumerate(tensors):
        assert tensor.shape == size
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 3 << 20])
def test_pages_begin_with_one(nbytes: int) -> None:
    assert len(pages(nbytes)) == nbytes
    assert pages(nbytes).data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what pages memory has")
def test_huge_pages_are_asked_for() -> None:
    tensor = empty([8 << 20], torch.uint8, lasting=True)
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() + (4 << 20) < int(found[2], 16)
        elif line.startswith("VmFlags:") and inside:
            flags = line
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has none")
    assert " hg" in flags


def test_memory_is_given_back() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not say how much there is")
    before = mapped()
    for _ in range(20):
        empty([1 << 28], torch.uint8)
    assert mapped() - before < 4 << 28
