"""Loggers write every round's figures once, also of runs that were resumed; each where its framework is installed."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fdcr_fast.sim import RoundRecord, resume, simulate
from fdcr_fast.sim.loggers.scalars import scalars
from fdcr_fast.sim.run import figures
from tests.support import users
from tests.support.tiny import tiny_config

BLOCK = 32768


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)


def interrupted(folder: Path, name: str) -> tuple[RoundRecord, ...]:
    """The rounds of a run of three with a logger, which was interrupted after the second and resumed."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(rounds=3, callbacks=name), folder, callbacks=[users.Stop(2, stop)])
    return resume(folder).rounds


def test_undefined_figures_are_left_out() -> None:
    (record,) = simulate(tiny_config(rounds=1, malicious=0, attack="none")).rounds
    found = scalars(record)
    assert found["accuracy"] == record.accuracy
    assert record.attack_success_rate is None
    assert not {"attack_success_rate", "round", "problem"} & set(found)


def test_names_of_callbacks(tmp_path: Path) -> None:
    told: list[Any] = []
    users.Told.to = told
    simulate(tiny_config(rounds=1, callbacks="tests.support.users:Told, tests.support.users:Told"), tmp_path)
    assert told == [1, 1]
    resume(tmp_path)
    with pytest.raises(ValueError, match=r"expected one of tensorboard, wandb, mlflow; did you mean 'wandb'"):
        tiny_config(callbacks=["wanda"])
    with pytest.raises(ValueError, match=r"callbacks: cannot import nowhere:Logger: ModuleNotFoundError"):
        simulate(tiny_config(callbacks="nowhere:Logger"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rounds = interrupted(tmp_path, "tensorboard")
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("accuracy")] == [
        (record.round, pytest.approx(record.accuracy)) for record in rounds
    ]


def chunks_of(path: Path) -> Iterator[bytes]:
    """The records of a log of Weights & Biases, which is one of LevelDB after seven bytes."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # what is too short for a header is left empty
            place += BLOCK - place % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield parts
            parts = b""


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rounds = interrupted(tmp_path, "wandb")

    def records() -> list[Any]:
        found = []
        for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
            for chunk in chunks_of(path):
                found.append(wandb_internal_pb2.Record())
                found[-1].ParseFromString(chunk)
        return found

    while not any(record.HasField("exit") for record in records()):  # its own process writes it, and may be behind
        time.sleep(0.1)
    logged = {}
    for record in records():
        if record.HasField("history"):
            found = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            logged[int(found["_step"])] = float(found["accuracy"])
    assert logged == {record.round: record.accuracy for record in rounds}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rounds = interrupted(tmp_path / "run", "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fdcr_fast")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(record.round, record.accuracy) for record in rounds]
    assert run.data.params["clients"] == "4"
    assert run.info.status == "FINISHED"
