"""A store in a file: how fast clients are put, and rounds aggregated, against a plain read of the file.

python -m pytest benchmarks/bench_store.py
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Report, interleave
from fdcr_fast import FDCR, FedAvg, UpdateStore

PARAMS, CLIENTS, RESIDENT_SHARE = 1_000_000, 100, 3
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpdateStore]:
    path = tmp_path_factory.mktemp("store") / "round.store"
    size = UpdateStore.required_bytes(PARAMS, CLIENTS)
    generator = torch.Generator().manual_seed(0)
    with UpdateStore(PARAMS, CLIENTS, path=path, max_resident=size // RESIDENT_SHARE) as store:
        for client in range(CLIENTS):
            attacker = client % 10 == 0
            update = torch.randn(PARAMS, generator=generator) * (5 if attacker else 1)
            store.put(update, torch.rand(PARAMS, generator=generator), 1)
        store.path = path  # type: ignore[attr-defined]
        yield store


def read_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, _READ_BYTES)
    for offset in range(0, os.fstat(fd).st_size, _READ_BYTES):
        os.preadv(fd, [buffer], offset)
    os.close(fd)


@pytest.mark.parametrize("rule", [FDCR(cluster="kmeans"), FedAvg()], ids=["FDCR", "FedAvg"])
def test_aggregation_from_a_file(store, rule):
    w = torch.zeros(PARAMS)
    path = store.path
    times = interleave({"read": lambda: read_file(path), "ours": lambda: rule.aggregate(w, store)}, seconds=12)
    share = times["read"].over(times["ours"])
    low, high = times["read"].spread_over(times["ours"])
    name = type(rule).__name__
    cells = {"what": name, "GB/s": f"{store.nbytes / times['ours'].median / 1e9:.2f}"}
    cells["of reading the file"] = f"{share:.2f} ({low:.2f} - {high:.2f})"
    REPORT.add(name, cells, {"share": share, "times": {key: t.seconds for key, t in times.items()}})


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no sync"])
def test_put(tmp_path, sync):
    clients = 10
    generator = torch.Generator().manual_seed(0)
    update, fisher = torch.randn(PARAMS, generator=generator), torch.rand(PARAMS, generator=generator)
    with UpdateStore(PARAMS, clients, path=tmp_path / "put.store", sync=sync) as file:
        memory = UpdateStore(PARAMS, clients)

        def round_of(store: UpdateStore) -> None:
            store.clear()
            for _ in range(clients):
                store.put(update, fisher, 1)

        times = interleave({"file": lambda: round_of(file), "memory": lambda: round_of(memory)}, seconds=8)
    for where, seconds in times.items():
        name = f"put, {where}" + ("" if where == "memory" else f", sync={sync}")
        rate = clients * PARAMS * 8 / seconds.median / 1e9
        REPORT.add(name, {"what": name, "GB/s": f"{rate:.2f}"}, {"seconds": seconds.seconds})
