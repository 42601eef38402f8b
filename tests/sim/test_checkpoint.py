from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from fdcr_fast.sim import ProgressEvent, SimulationConfig, SimulationResult, resume, simulate
from fdcr_fast.sim.checkpoint import RunFolder, write_atomically
from fdcr_fast.sim.workers import IMPORTED_ONCE


def killed_run(config: SimulationConfig, folder: Path, round: int, clients_done: int) -> None:
    def kill(event: ProgressEvent) -> None:
        if (event.round, event.clients_done) == (round, clients_done):
            os._exit(9)

    simulate(config, folder, kill)


def kill_in(*arguments: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=killed_run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9


def without_costs(result: SimulationResult) -> list[dict[str, object]]:
    costs = {name for name in type(result.rounds[0]).model_fields if name.endswith("_seconds")} | {"peak_rss_bytes"}
    return [record.model_dump(exclude=costs) for record in result.rounds]


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
    config = tiny_config(rounds=4, threads=1, server=server, **ATTACKS[attack])
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
    assert len((tmp_path / "rounds.csv").read_text().splitlines()) == 5
    assert (tmp_path / "summary.json").exists()


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
    assert again.summary == finished.summary
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


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
