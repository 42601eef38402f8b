from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdcr_fast import _native
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.fedavg import FedAvg
from fdcr_fast.store.file import format as file_format
from fdcr_fast.store.file import rows as file_rows
from fdcr_fast.store.file import tiles as file_tiles
from fdcr_fast.store.file.format import DamagedStoreError
from fdcr_fast.store.file.rows import FileRows
from fdcr_fast.store.rows import StoreShape
from fdcr_fast.store.update_store import UpdateStore

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def vectors(client, P):
    generator = torch.Generator().manual_seed(client)
    return torch.randn(P, generator=generator), torch.rand(P, generator=generator)


def fill(store, clients):
    for client in clients:
        assert store.put(*vectors(client, store.num_params), client + 1, client), store.rejected
    return store


def assert_holds(store, clients):
    assert sorted(store.clients) == sorted(clients)
    for kept in store:
        update, fisher = vectors(kept.client, store.num_params)
        assert torch.equal(kept.update, update.to(store.dtype))
        assert torch.equal(kept.fisher, fisher.to(store.dtype))
        assert kept.num_samples == kept.client + 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "round.store"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    P=st.integers(1, 9000),
    K=st.integers(1, 6),
    spare=st.integers(0, 2),
    tile=st.sampled_from([None, 1024, 2048, 700, 64]),
    dtype=st.sampled_from(FLOATS),
    with_fishers=st.booleans(),
    removed=st.booleans(),
    room=st.integers(3, 9),
)
def test_memory_and_file_are_the_same(tmp_path, P, K, spare, tile, dtype, with_fishers, removed, room):
    path = tmp_path / "same.store"
    path.unlink(missing_ok=True)
    tile = tile or FileRows.tile(P, K + spare, dtype, with_fishers, None)
    options = {"tile": tile, "with_fishers": with_fishers}
    shape = StoreShape(P, K + spare, tile, dtype, with_fishers)
    resident = room * file_tiles.whole_stretches(shape, 0) * shape.capacity * shape.piece_bytes
    memory = UpdateStore(P, K + spare, dtype, **options)
    with UpdateStore(P, K + spare, dtype, path=path, max_resident=resident, sync=False, **options) as file:
        for store in (memory, file):
            for k in range(K):
                update, fisher = vectors(k, P)
                fisher[0], fisher[-1] = 0, 2
                store.put(update, fisher if with_fishers else None, k + 1)
            if removed and K > 2:
                store.remove(1)
        rule = FDCR() if with_fishers and P > 1 else FedAvg()
        with UpdateStore.open(path, max_resident=resident, verify=True) as read_only:
            results = [rule.aggregate(torch.zeros(P), store) for store in (memory, file, read_only)]
            for one, other, third in zip(memory, file, read_only, strict=True):
                assert one.client == other.client == third.client
                assert torch.equal(one.update, other.update)
                assert torch.equal(one.update, third.update)
                assert not with_fishers or torch.equal(one.fisher, other.fisher)
    for result in results[1:]:
        assert result.clients == results[0].clients
        assert torch.equal(result.params, results[0].params)
        assert torch.equal(result.scores.nan_to_num(), results[0].discrepancy.nan_to_num())


@pytest.mark.parametrize("span_bytes", [1, 1 << 14, 1 << 30])
@pytest.mark.parametrize("tile", [1000, 1024])
def test_spans_and_windows_cover_the_round(path, monkeypatch, span_bytes, tile):
    monkeypatch.setattr(file_tiles, "_SPAN_BYTES", span_bytes)
    P, K = 10_500, 3
    expected = torch.stack([vectors(k, P)[0] for k in range(K)])
    with fill(UpdateStore(P, K, path=path, tile=tile, sync=False), range(K)) as store:
        tiles = store.client_updates().tiles
        seen = 0
        for span in tiles.spans():
            assert span.first == seen
            rows = span.updates.transpose(0, 1).reshape(K, -1)[:, : span.num_params]
            assert torch.equal(rows, expected[:, seen : seen + span.num_params])
            seen += span.num_params
        assert seen == P
        window = tiles.window(2 * tile + 5, 30)
        assert torch.equal(window.updates[0], expected[:, 2 * tile + 5 :][:, :30])


def test_a_file_opens_again_and_goes_on(path):
    fill(UpdateStore(50, 4, path=path), [0, 1, 2]).close()
    with UpdateStore.open(path, "r+", verify=True) as store:
        assert_holds(store, [0, 1, 2])
        store.remove(1)
        fill(store, [7])
        assert not store.put(*vectors(7, 50), 1, 7)
        assert_holds(store, [0, 2, 7])
    with UpdateStore.open(path, "r+") as store:
        assert_holds(store, [0, 2, 7])
        store.clear()
        fill(store, [3])
    with UpdateStore.open(path, verify=True) as store:
        assert_holds(store, [3])


def test_other_processes_read_while_one_writes(path):
    with fill(UpdateStore(50, 4, path=path), [0, 1]) as store:
        code = (
            "import sys; from fdcr_fast import _native, UpdateStore\n"
            "with UpdateStore.open(sys.argv[1], verify=True) as store:\n"
            "    print(store.clients, *(round(kept.update.double().square().sum().item(), 6) for kept in store))\n"
            "try: UpdateStore.open(sys.argv[1], 'r+')\n"
            "except BlockingIOError as error: print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
        norms = [round(vectors(k, 50)[0].double().square().sum().item(), 6) for k in (0, 1)]
        assert result.stdout.splitlines() == [
            f"(0, 1) {norms[0]} {norms[1]}",
            f"another process has {os.fspath(path)!r} open for writing",
        ], result.stderr
        reader = UpdateStore.open(path)
        fill(store, [2])
        assert_holds(reader, [0, 1])  # what was there when it was opened
        store.remove(0)
        with pytest.raises(RuntimeError, match="removed or replaced"):
            FedAvg().aggregate(torch.zeros(50), reader)
        with pytest.raises(RuntimeError, match="removed or replaced"):
            list(reader)
        reader.close()
    with UpdateStore.open(path, "r+") as store:
        assert_holds(store, [1, 2])


def test_what_a_store_refuses(path):
    with fill(UpdateStore(50, 3, path=path), [0]) as store:
        with pytest.raises(FileExistsError):
            UpdateStore(50, 2, path=path)
        with pytest.raises(ValueError, match="in a file"):
            _ = store.updates
        for client, reason in ((1.5, "str or int, got float"), (True, "got bool"), ("x" * 999, "up to 462 bytes")):
            assert not store.put(*vectors(1, 50), 1, client)
            assert reason in store.rejected[client]
        assert store.put(*vectors(1, 50), 1, "naïve \N{SNOWMAN}")
    with pytest.raises(RuntimeError, match="the store is closed"):
        list(store)
    with pytest.raises(RuntimeError, match="the store is closed"):
        FedAvg().aggregate(torch.zeros(50), store)
    with pytest.raises(RuntimeError, match="the store is closed"):
        fill(store, [1])
    with UpdateStore.open(path) as store:
        assert store.clients == (0, "naïve \N{SNOWMAN}")
        with pytest.raises(RuntimeError, match="opened for reading"):
            store.remove(0)
    with pytest.raises(ValueError, match="mode must be"):
        UpdateStore.open(path, "w")
    with pytest.raises(ValueError, match="max_resident must be at least"):
        UpdateStore.open(path, max_resident=100)
    with pytest.raises(ValueError, match="on the CPU"):
        UpdateStore(50, 2, path=path.with_name("other"), device="cuda")
    with pytest.raises(ValueError, match="of disk are left"):
        UpdateStore(10**9, 10**6, path=path.with_name("huge"), tile=1, max_resident=10**9)
    assert os.listdir(path.parent) == [path.name]


def test_resident_memory_is_bounded(path):
    status = Path("/proc/self/status")
    P, K, resident = 400_000, 60, 1 << 23
    beside = 16  # parameters, and a client's vectors
    if not _native.loaded:
        beside += 64  # temporaries of plain PyTorch

    def megabytes(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) / 1024

    rule, w = FDCR(), torch.zeros(P)
    with UpdateStore(P, K, path=path, max_resident=resident, sync=False) as store:
        assert store.nbytes / 2**20 > 2 * (resident / 2**20 + beside)
        fill(store, [0, 1, 2])
        rule.aggregate(w, store)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        except OSError:
            pytest.skip("the system does not tell peaks")
        before = megabytes("VmHWM")
        for client in range(3, K):
            fill(store, [client])
        rule.aggregate(w, store)
        assert megabytes("VmHWM") - before < resident / 2**20 + beside


# --- damage ----------------------------------------------------------------------------------------------------------


def exact_or_error(path, clients):
    try:
        store = UpdateStore.open(path, verify=True)
    except DamagedStoreError:
        return False
    with store:
        assert_holds(store, clients)
    return True


def test_flipped_bits_are_told_or_do_no_harm(path):
    fill(UpdateStore(300, 3, path=path, tile=64), [0, 1]).close()
    original, chance = path.read_bytes(), random.Random(0)
    shape = file_format.unpack_header(original[: file_format.PAGE])
    data = file_format.data_offset(shape)
    regions = [range(64), range(file_format.PAGE, file_format.PAGE + 3 * 512), range(data, len(original))]
    found = 0
    for _ in range(600):
        damaged = bytearray(original)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.choice(chance.choice(regions))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        found += not exact_or_error(path, [0, 1])
    assert found > 300


def test_truncated_files_and_lost_stretches_are_told(path):
    fill(UpdateStore(300, 3, path=path, tile=64), [0, 1, 2]).close()
    original, chance = path.read_bytes(), random.Random(0)
    for _ in range(100):
        path.write_bytes(original[: chance.randrange(len(original))])
        assert not exact_or_error(path, [0, 1, 2])
    path.write_bytes(original + b"x")
    assert not exact_or_error(path, [0, 1, 2])
    data = file_format.data_offset(file_format.unpack_header(original[: file_format.PAGE]))
    for start in range(data, len(original) - 256, 256):
        path.write_bytes(original[:start] + bytes(256) + original[start + 256 :])
        exact_or_error(path, [0, 1, 2])


@pytest.mark.parametrize("content", [b"", b"FDCRSTOR", bytes(4096), b"PK\3\4" * 2000, b"FDCRSTOR" * 1000])
def test_other_files_are_no_stores(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=r"cannot be opened: "):
        UpdateStore.open(path)


def test_a_newer_version_is_named(path, monkeypatch):
    monkeypatch.setattr(file_format, "_VERSION", 2)
    UpdateStore(3, 1, path=path).close()
    monkeypatch.undo()
    with pytest.raises(DamagedStoreError, match="it is of version 2, and this library reads version 1"):
        UpdateStore.open(path)


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment(tmp_path):
    script = Path(__file__).with_name("kill_puts.py")
    command = [sys.executable, script, "200", tmp_path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    match = re.search(r"200 kills, the store differed after (\d+)", result.stdout)
    assert int(match[1]) > 50, result.stdout


class Disk:
    """Records writes and flushes, and makes the files that a loss of power could leave."""

    def __init__(self, monkeypatch):
        self.log = []
        write, flush = os.pwrite, os.fdatasync

        def pwrite(fd, data, offset):
            self.log.append(("write", offset, bytes(data)))
            return write(fd, data, offset)

        def fdatasync(fd):
            flush(fd)
            self.log.append(("flush",))

        monkeypatch.setattr(file_rows.os, "pwrite", pwrite)
        monkeypatch.setattr(file_rows.os, "fdatasync", fdatasync)

    def after_power_loss(self, content, length, chance):
        """The file after the first ``length`` events: what was flushed, and any sectors of what was not."""
        content = bytearray(content)
        flushed = max((i for i in range(length) if self.log[i][0] == "flush"), default=-1)
        for i in range(length):
            if self.log[i][0] != "write":
                continue
            _, offset, data = self.log[i]
            for start in range(0, len(data), 512):
                if i < flushed or chance.random() < 0.5:
                    sector = data[start : start + 512]
                    content[offset + start : offset + start + len(sector)] = sector
        return content


def test_a_loss_of_power_leaves_what_had_returned(path, monkeypatch):
    """Every write that was not flushed may be lost, in any order and in part."""
    P = 300
    UpdateStore(P, 4, path=path, tile=1024).close()
    empty = path.read_bytes()
    disk = Disk(monkeypatch)
    with UpdateStore.open(path, "r+") as store:
        done = [(0, {})]  # length of the log, and clients by their number of samples, as each call returned
        for step, client in enumerate([1, 2, 3, -2, 4, 1, -3, 2, 1, -1, 3]):
            held = dict(done[-1][1])
            if client < 0:
                store.remove(-client)
                del held[-client]
            else:
                assert store.put(*vectors(step, P), step + 1, client, replace=True)
                held[client] = step + 1
            done.append((len(disk.log), held))
    monkeypatch.undo()
    chance = random.Random(0)
    lost = path.with_name("lost")
    for length in range(len(disk.log) + 1):
        before = max((state for state in done if state[0] <= length), key=lambda state: state[0])[1]
        after = next((held for end, held in done if end >= length), before)
        for _ in range(4):
            lost.write_bytes(disk.after_power_loss(empty, length, chance))
            for mode in ("r", "r+"):
                with UpdateStore.open(lost, mode, verify=True) as store:
                    held = {kept.client: int(kept.num_samples) for kept in store}
                    assert held in (before, after)
                    for kept in store:
                        update, fisher = vectors(int(kept.num_samples) - 1, P)
                        assert torch.equal(kept.update, update)
                        assert torch.equal(kept.fisher, fisher)
