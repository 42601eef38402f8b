"""Large tensors in memory of their own."""

from __future__ import annotations

import mmap
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fdcr_fast import ops
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


def means(P: int, values: list[float], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """New parameters of rounds of one client, all of which are one number."""
    one, w = torch.ones(1, dtype=torch.float64), torch.zeros(P, dtype=dtype)
    return [ops.rescaled_mean(w, torch.full((1, 1, P), x, dtype=dtype), None, None, None, one, False) for x in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("P", [1, 1 << 17, (1 << 18) + 1, 3_000_001])
def test_results_that_are_held_have_memory_of_their_own(P: int, dtype: torch.dtype) -> None:
    results = means(P, [1, 2, 3], dtype)
    del results[1]
    results += means(P, [4, 5], dtype)
    assert [x.unique().tolist() for x in results] == [[1], [3], [4], [5]]


def test_memory_of_a_result_serves_the_next_one_of_its_size() -> None:
    if not ops.rescaled_mean.has_kernel("CPU") or sys.platform != "linux":
        pytest.skip("results are what PyTorch gives")
    P = 3_000_001
    (first,) = means(P, [1])
    place = first.data_ptr()
    view = first[5:]
    del first
    assert means(P, [2])[0].data_ptr() != place, "a view still shows it"
    assert view.unique().tolist() == [1]
    place = view.data_ptr() - 20
    del view
    assert means(P, [3])[0].data_ptr() == place
    assert means(2 * P, [3])[0].data_ptr() != place


def test_threads_make_results_side_by_side() -> None:
    def work(number: int) -> bool:
        return all(means(400_000, [number + i])[0].unique().tolist() == [number + i] for i in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(0, 160, 20)))


def test_results_of_many_sizes_do_not_pile_up() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not say how much there is")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    means(1 << 22, [1])
    before = resident()
    for P in range(1 << 20, 1 << 23, 1 << 20):
        means(P, [1, 2])
    assert resident() - before < 3 * (4 << 23)
