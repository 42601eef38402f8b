"""A simulation over several processes, whose result does not depend on how many they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup

from fdcr_fast.sim import ClientRecord, ProgressEvent, SimulationConfig, resume, simulate
from fdcr_fast.sim.clients.participation import draw_participants
from fdcr_fast.sim.clients.population import Job, Population, Upload
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.execution.ranks import torchrun_group
from fdcr_fast.sim.run.records import RankRecord
from tests.support.ranks import Ranks
from tests.support.tiny import tiny_config, without_costs, write_npz

CROWD: dict[str, Any] = {
    "clients": 15,
    "participants": 11,
    "min_samples": 5,
    "malicious": (1, 5, 8, 9),
    "dropout": 0.2,
    "stragglers": 0.3,
}
WITH_BUFFERS: dict[str, Any] = {
    "model": "tests.support.users:Residual",
    "model_options": {"width": 32},  # more parameters than a block has for each rank
    "dataset": "tests.support.users:data",
}
Found = tuple[
    tuple[torch.Tensor, torch.Tensor],
    list[dict[str, object]],
    tuple[ClientRecord, ...],
    torch.Tensor,
    tuple[RankRecord, ...],
]


class Unlucky(Population):
    """One client fails, and others send what cannot be used: an update, and buffers if the model has any."""

    def perform(self, work: LocalWork, job: Job) -> Upload:
        benign = sorted(set(draw_participants(work.config, 2).epochs) - self.attackers.clients)
        bad_luck = benign.index(job.client) if work.round == 2 and job.client in benign else 0
        if bad_luck == 1:
            raise OSError("no space left")
        upload = super().perform(work, job)
        if bad_luck == 3:
            self.buffers.put(job.row, self.buffers[job.row] / 0)
        return upload._replace(update=upload.update / 0) if bad_luck == 2 else upload


def run(group: ProcessGroup | None, config: SimulationConfig | None, out: Path | None = None) -> Found:
    """Simulate, or resume where there is no configuration."""
    from fdcr_fast.sim.run import federation

    federation.Population = Unlucky  # type: ignore[misc]
    try:
        result = resume(out, group=group) if config is None else simulate(config, out, group=group)  # type: ignore[arg-type]
    finally:
        federation.Population = Population  # type: ignore[misc]
    return (result.params, result.buffers), without_costs(result), result.clients, result.similarity, result.ranks


def assert_same(found: Found, expected: Found, exactly: bool = True) -> None:
    """The same bits, but for the similarity, and of a coalition for the scores and the weights after clipping."""
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    if not exactly:
        scores = [
            torch.tensor([(record.discrepancy or 0, record.weight or 0) for record in clients], dtype=torch.float64)
            for clients in (found[2], expected[2])
        ]
        torch.testing.assert_close(*scores, rtol=1e-12, atol=1e-11)  # some are differences of larger ones
        unscored = {"discrepancy": None, "weight": None, "explanation": ""}  # which holds rounded numbers
        found, expected = (
            (*one[:2], tuple(record.model_copy(update=unscored) for record in one[2]), *one[3:])
            for one in (found, expected)
        )
    assert found[1:3] == expected[1:3]
    assert found[4] == expected[4]
    torch.testing.assert_close(found[3], expected[3], rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, {"server": "fdcr", "attacker_fisher": "random", "watch": "fdcr, median"}),
        (2, {"server": "multi-krum", "attacker_update": "alie", "attacker_fisher": "noisy-benign-mean"}),
        (3, {"server": "fdcr", "dataset": "FILE"}),
        (2, {"server": "fdcr", **WITH_BUFFERS}),
        (3, {"server": "median", "attacker_update": "alie", **WITH_BUFFERS}),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    ranks: Ranks, tmp_path: Path, size: int, fields: dict[str, Any]
) -> None:
    if fields.get("dataset") == "FILE":
        fields = {**fields, "dataset": str(write_npz(tmp_path / "data.npz", train=120))}
    config = tiny_config(**CROWD, **fields)
    expected = run(None, config)
    reasons = [client.reason for client in expected[2]]
    assert "failed: OSError: no space left" in reasons
    assert "the update is not finite, or too large to be squared in float64" in reasons
    assert ("buffer norm.running_mean is not finite" in reasons) == ("model" in fields)
    for found in ranks.call(size, run, config):
        assert_same(found, expected, exactly=config.server == "fdcr")


def test_a_run_of_one_process_is_resumed_by_two(ranks: Ranks, tmp_path: Path) -> None:
    config = tiny_config(**CROWD, server="coalition-fdcr", rounds=3)
    expected = run(None, config)

    def stop(event: ProgressEvent) -> None:
        if (event.round, event.clients_done) == (3, 1):
            raise KeyboardInterrupt

    from fdcr_fast.sim.run import federation

    federation.Population = Unlucky  # type: ignore[misc]
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path, stop)
    finally:
        federation.Population = Population  # type: ignore[misc]
    for found in ranks.call(2, run, None, tmp_path):
        assert_same(found, expected, exactly=False)
    assert json.loads((tmp_path / "summary.json").read_text())


def test_rounds_in_which_nobody_sends_anything(ranks: Ranks) -> None:
    config = tiny_config(stragglers=1.0, rounds=1)
    expected = run(None, config)
    assert_same(ranks.call(2, run, config)[1], expected)


def test_errors_are_those_of_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    config = tiny_config(rounds=1)
    run(None, config, tmp_path)
    for kind, message in ranks.errors(2, run, config, tmp_path):
        assert (kind, str(tmp_path) in message) == ("FileExistsError", True)
    for kind, message in ranks.errors(2, run, tiny_config(server="foolsgold")):
        assert (kind, message.split(":")[0]) == ("ValueError", "server foolsgold needs all parameters in one process")


@pytest.mark.parametrize("patience", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, patience: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("FDCR_FAST_TIMEOUT", patience)
    with pytest.raises(ValueError, match="FDCR_FAST_TIMEOUT must be a positive number"), torchrun_group():
        pass


@pytest.mark.parametrize("fields", [{}, {**WITH_BUFFERS, "workers": 2, "save_every": 1, "server": "fdcr"}])
def test_the_command_runs_under_torchrun(tmp_path: Path, fields: dict[str, Any]) -> None:
    settings = tiny_config(rounds=1, **fields)
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "fdcr_fast", "simulate", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results and figures are in") == 1
    expected = tmp_path / "expected"
    simulate(settings, expected)
    assert (tmp_path / "run" / "clients.csv").read_text() == (expected / "clients.csv").read_text()
    saved = [model.name for model in expected.glob("*.safetensors")]
    assert saved == (["model-00001.safetensors"] if "save_every" in fields else [])
    for name in saved:
        assert (tmp_path / "run" / name).read_bytes() == (expected / name).read_bytes()
