"""A store in a file: how fast clients are put, and rounds aggregated, against a plain read of the file.

python -m pytest benchmarks/bench_store.py
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.tables import Report
from fdcr_fast import FDCR, FedAvg, UpdateStore

PARAMS, CLIENTS, RESIDENT_SHARE = 1_000_000, 100, 3
LEAST_RESIDENT = 1 << 21  # what spans of all clients take, however short their rows
_READ_BYTES = 1 << 23

REPORT = Report(
    "store",
    "Stores in a file",
    "python -m pytest benchmarks/bench_store.py",
    f"""\
P = {PARAMS:,}, float32, {CLIENTS} clients, ``max_resident`` a third of the file. *of reading the file*: time of
reading it with ``O_DIRECT`` in pieces of {_READ_BYTES >> 20} MiB over ours, medians of interleaved repeats in one
process; the page cache is passed by in both. *put*: bytes of updates and Fishers per second into a store that was
written before.""",
)


class Stored(NamedTuple):
    store: UpdateStore
    path: Path
    P: int


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, sized: Callable[[int, int], tuple[int, int]]) -> Iterator[Stored]:
    path = tmp_path_factory.mktemp("store") / "round.store"
    K, P = sized(CLIENTS, PARAMS)
    resident = max(UpdateStore.required_bytes(P, K) // RESIDENT_SHARE, LEAST_RESIDENT)
    generator = torch.Generator().manual_seed(0)
    with UpdateStore(P, K, path=path, max_resident=resident) as store:
        for client in range(K):
            attacker = client % 10 == 0
            update = torch.randn(P, generator=generator) * (5 if attacker else 1)
            store.put(update, torch.rand(P, generator=generator), 1)
        yield Stored(store, path, P)


def read_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, _READ_BYTES)
    for offset in range(0, os.fstat(fd).st_size, _READ_BYTES):
        os.preadv(fd, [buffer], offset)
    os.close(fd)


@pytest.mark.parametrize("rule", [FDCR(cluster="kmeans"), FedAvg()], ids=["FDCR", "FedAvg"])
def test_aggregation_from_a_file(bench, stored, rule):
    store, path, P = stored
    w = torch.zeros(P)
    contenders = {"ours": lambda: rule.aggregate(w, store), "read": lambda: read_file(path)}
    times = bench.compare(contenders, share=0.3).times
    share = times["read"].over(times["ours"])
    low, high = times["read"].spread_over(times["ours"])
    name = type(rule).__name__
    cells = {"what": name, "GB/s": f"{store.nbytes / times['ours'].median / 1e9:.2f}"}
    cells["of reading the file"] = f"{share:.2f} ({low:.2f} - {high:.2f})"
    bench.add(name, cells, {"share": share, "times": {key: t.seconds for key, t in times.items()}})


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no sync"])
def test_put(bench, sized, tmp_path, sync):
    clients, P = sized(10, PARAMS)
    generator = torch.Generator().manual_seed(0)
    update, fisher = torch.randn(P, generator=generator), torch.rand(P, generator=generator)
    with UpdateStore(P, clients, path=tmp_path / "put.store", sync=sync) as file:
        memory = UpdateStore(P, clients)

        def round_of(store: UpdateStore) -> None:
            store.clear()
            for _ in range(clients):
                store.put(update, fisher, 1)

        contenders = {"file": lambda: round_of(file), "memory": lambda: round_of(memory)}
        times = bench.compare(contenders, share=0.2).times
    for where, seconds in times.items():
        name = f"put, {where}" + ("" if where == "memory" else f", sync={sync}")
        rate = clients * P * 8 / seconds.median / 1e9
        bench.add(name, {"what": name, "GB/s": f"{rate:.2f}"}, {"seconds": seconds.seconds})
