from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fdcr_fast.sim import ProgressEvent, RoundRecord, SimulationConfig, Summary, resume, simulate
from fdcr_fast.sim.execution.forkserver import forkserver_context
from fdcr_fast.sim.run import figures, folder, metrics
from fdcr_fast.sim.run.folder import RunFolder, append_records, read_records, write_atomically
from tests.support.tiny import tiny_config, without_costs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    simulate(tiny_config(), folder)
    return folder


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let all writes fail, but for the first ones."""
    fsync, writes = os.fsync, itertools.count()

    def fail(file: int) -> None:
        if next(writes) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail)


def killed_run(config: SimulationConfig, folder: Path, round: int, clients_done: int) -> None:
    def kill(event: ProgressEvent) -> None:
        if (event.round, event.clients_done) == (round, clients_done):
            os._exit(9)

    simulate(config, folder, kill)


def kill_in(*arguments: Any) -> None:
    process = forkserver_context().Process(target=killed_run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9


ATTACKS: dict[str, dict[str, Any]] = {
    "random-fisher": {"attacker_fisher": "random"},
    "neurotoxin": {"attacker_training": "neurotoxin", "attacker_update": "scale", "attack_rounds": "1,3-"},
}


@pytest.mark.parametrize(
    ("server", "attack"),
    [
        ("fdcr", "random-fisher"),
        ("coalition-fdcr", "random-fisher"),
        ("foolsgold", "random-fisher"),
        ("fedavg", "neurotoxin"),
    ],
)
def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path: Path, server: str, attack: str) -> None:
    config = tiny_config(rounds=4, threads=1, server=server, watch=["coalition-fdcr", "fdcr"], **ATTACKS[attack])
    expected = simulate(config)
    kill_in(config, tmp_path, 3, 2)
    assert not (tmp_path / "summary.json").exists()
    with (tmp_path / "rounds.csv").open("a") as file:
        file.write("3,0.5,trunc")  # as if killed while writing, before the checkpoint
    resumed = resume(tmp_path)
    assert torch.equal(resumed.params, expected.params)
    assert torch.equal(resumed.similarity, expected.similarity)
    assert without_costs(resumed) == without_costs(expected)
    assert resumed.clients == expected.clients
    assert resumed.scores == expected.scores
    assert resumed.ranks == expected.ranks
    assert len((tmp_path / "rounds.csv").read_text().splitlines()) == 5
    assert (tmp_path / "summary.json").exists()


def test_a_checkpoint_of_before_rules_looked_on_is_resumed(tmp_path: Path) -> None:
    config = tiny_config(rounds=3, threads=1)
    kill_in(config, tmp_path, 2, 2)
    with np.load(tmp_path / "checkpoint.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    np.savez(tmp_path / "checkpoint.npz", **{**kept, "csv_sizes": kept["csv_sizes"][:2]})
    assert torch.equal(resume(tmp_path).params, simulate(config).params)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    config = tiny_config(threads=1)
    kill_in(config, tmp_path, 1, 1)
    (tmp_path / "rounds.csv").write_text("round,acc")
    assert torch.equal(resume(tmp_path).params, simulate(config).params)


def test_resuming_a_finished_run_only_reports_it(tmp_path: Path) -> None:
    finished = simulate(tiny_config(), tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "similarity.png").unlink()
    again = resume(tmp_path, lambda event: pytest.fail("nothing is left to train"))
    assert torch.equal(again.params, finished.params)
    assert torch.equal(again.similarity, finished.similarity)
    assert again.summary.model_copy(update={"seconds": finished.summary.seconds}) == finished.summary
    assert (tmp_path / "summary.json").exists()
    assert (tmp_path / "similarity.png").exists()


def test_folders_that_cannot_be_resumed_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run to resume.*config\.yaml"):
        resume(tmp_path)
    simulate(tiny_config(), tmp_path)
    content = (tmp_path / "clients.csv").read_bytes()
    (tmp_path / "clients.csv").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"clients\.csv has .* bytes, its checkpoint expects"):
        RunFolder(tmp_path).load()


@pytest.mark.parametrize("content", [b"no record", b"\xff\xfe", b"PK\x03\x04", b"\x80\x04pickled"])
@pytest.mark.parametrize("name", ["config.yaml", "rounds.csv", "checkpoint.npz", "summary.json"])
def test_a_damaged_file_is_named(finished: Path, tmp_path: Path, name: str, content: bytes) -> None:
    copy = RunFolder(shutil.copytree(finished, tmp_path / "copy"))
    path = copy.path / name
    path.write_bytes(content.ljust(path.stat().st_size))  # of the size that the checkpoint expects
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        copy.config(), copy.read(), copy.summary()
    assert "unsafe" not in str(raised.value), "what NumPy says of files with code in them"


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "something is left that takes space"


WRITES_OF_A_RUN = {
    "config.yaml": 1,
    "rounds.csv": 5,
    "clients.csv": 6,
    "checkpoint.npz": 7,
    "accuracy.png": 8,
    "accuracy.svg": 9,
    "clients.png": 10,
    "clients.svg": 11,
    "similarity.png": 12,
    "similarity.svg": 13,
    "summary.json": 14,
}


@pytest.mark.parametrize("name", ["config.yaml", "clients.csv", "checkpoint.npz", "similarity.png", "summary.json"])
def test_a_full_disk_is_said_by_file_and_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, folder = tiny_config(), tmp_path / "run"
    monkeypatch.setattr(Figure, "savefig", lambda _figure, file, **_: file.write(b"pixels"))  # which takes a second
    with monkeypatch.context() as patch:
        fill_the_disk(patch, after=WRITES_OF_A_RUN[name] - 1)
        with pytest.raises(OSError, match=rf"No space left on device: '{folder / name}'"):
            simulate(config, folder)
    assert not list(folder.glob(".*"))
    expected = simulate(config)
    result = simulate(config, folder) if name == "config.yaml" else resume(folder)
    assert torch.equal(result.params, expected.params)
    assert without_costs(result) == without_costs(expected)
    assert {path.name for path in folder.iterdir()} == set(WRITES_OF_A_RUN)


def test_records_of_other_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    path.write_text("round,accuracy\n1,0.5\n")
    with pytest.raises(ValueError, match=r"rounds\.csv has other columns than this version"):
        read_records(path, RoundRecord)


def test_the_wall_time_of_a_run_is_that_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: time.sleep(0.05))

    def idle(event: ProgressEvent) -> None:
        time.sleep(0.01)
        if stop and (event.round, event.clients_done) == (3, 1):
            raise KeyboardInterrupt

    stop, start = True, time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(rounds=3), tmp_path, idle)
    first, stop, start = time.perf_counter() - start, False, time.perf_counter()
    resumed = resume(tmp_path, idle)
    second = time.perf_counter() - start
    rounds, seconds = resumed.rounds, resumed.summary.seconds
    before = sum(record.seconds for record in rounds[:2])
    assert before < first
    assert before + rounds[2].seconds + 0.05 < seconds < before + second
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] == seconds
    idled = 3 * 4 + 1  # after every client, and after the first round; after the second one it was interrupted
    assert seconds - sum(resumed.summary.phase_seconds.values()) > 0.01 * idled + 0.05


def test_a_run_that_began_without_a_metric_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(RoundRecord):
        novelty: float | None = None

    class NewerSummary(Summary):
        novelty: float | None = None

    def stop(event: ProgressEvent) -> None:
        if (event.round, event.clients_done) == (3, 1):
            raise KeyboardInterrupt

    config = tiny_config(rounds=4)
    expected = simulate(config)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path, stop)
    begun = (tmp_path / "rounds.csv").read_text()
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    for module in (folder, metrics):
        monkeypatch.setattr(module, "RoundRecord", Newer)
        monkeypatch.setattr(module, "Summary", NewerSummary)
    monkeypatch.setitem(metrics.METRICS, "novelty", lambda round: len(round.clients) / 8)
    resumed = resume(tmp_path)
    assert torch.equal(resumed.params, expected.params)
    assert [dict(record)["novelty"] for record in resumed.rounds] == [None, None, 0.5, 0.5]
    assert dict(resumed.summary)["novelty"] == 0.5
    assert [
        {name: value for name, value in record.items() if name != "novelty"} for record in without_costs(resumed)
    ] == without_costs(expected)
    text = (tmp_path / "rounds.csv").read_text()
    assert text.startswith(begun), "a file keeps the columns that it began with"
    assert len(text.splitlines()) == 5
    assert [dict(record)["novelty"] for record in resume(tmp_path).rounds] == [None] * 4


def test_columns_that_are_not_there_have_their_defaults(tmp_path: Path) -> None:
    result = simulate(tiny_config(), tmp_path)
    path = tmp_path / "rounds.csv"
    with path.open(newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name != "exclusion_rate"} for row in csv.DictReader(file)]
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n")
    without = [record.model_copy(update={"exclusion_rate": None}) for record in result.rounds]
    assert read_records(path, RoundRecord) == without
    text = path.read_text()
    append_records(path, result.rounds[:1])
    assert path.read_text() == text + text.splitlines()[1] + "\n"
    path.write_text(text.replace("tradeoff", "unknown"))
    with pytest.raises(ValueError, match=r"rounds\.csv has other columns than this version"):
        read_records(path, RoundRecord)
