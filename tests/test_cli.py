from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

import fdcr_fast
from fdcr_fast import __main__, cli, commands
from fdcr_fast.sim import ProgressEvent, SimulationConfig, SimulationResult, simulate
from fdcr_fast.sim.run import figures
from fdcr_fast.sim.study import Run, Study, StudyEvent, StudyProgress
from fdcr_fast.sim.study.folder import StudyRunFolder

SMALL = {"max_train_samples": 240, "max_test_samples": 60, "clients": 4, "rounds": 2, "local_epochs": 1}
TINY = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)


def interrupted_in(server: str) -> Callable[..., SimulationResult]:
    """A simulation that is interrupted in the second round under a server."""

    def run(config: SimulationConfig, *arguments: Any) -> SimulationResult:
        def progress(event: ProgressEvent) -> None:
            if (config.server, event.round) == (server, 2):
                raise KeyboardInterrupt

        return simulate(config, arguments[0], progress)

    return run


def test_every_setting_has_its_flag_and_every_flag_its_setting() -> None:
    options = {name: option for option in cli.simulate_command.params for name in option.opts}
    own = {"--config", "--out", "--resume"}
    assert set(options) == own | {f"--{name.replace('_', '-')}" for name in SimulationConfig.model_fields}
    for name, field in SimulationConfig.model_fields.items():
        option = options[f"--{name.replace('_', '-')}"]
        assert isinstance(option, click.Option)
        assert option.help
        assert field.description
        assert field.description in option.help
        assert bool(option.secondary_opts) == (field.annotation is bool)
    named = """
        --dataset --data-dir --clients --beta --malicious --attack --attacker-fisher --server --rounds
        --local-epochs --batch-size --lr --seed --max-train-samples --max-test-samples --out --resume
        --momentum --weight-decay --model --split --min-samples --target --poison-share --trigger
        --discrepancy --cluster --partition --rescale --importance --norm-bound --threads
    """
    assert set(named.split()) <= set(options)


def test_help_shows_choices_and_defaults() -> None:
    text = " ".join(invoke("simulate", "--help").output.split())
    for part in (
        "--server fedavg|fdcr|coalition-fdcr|norm-clipping|",
        "first|last",
        "[default: paper]",
        "--rescale / --no-rescale",
        "0.01",
    ):
        assert part in text


def test_info() -> None:
    assert invoke("info").output.strip() == fdcr_fast.info().strip()
    assert invoke().output.startswith(fdcr_fast.info())
    assert fdcr_fast.__version__ in invoke("--version").output


def test_simulate_writes_reports_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("simulate", *TINY, "--no-rescale", "--malicious", "1,", "--out", str(out))
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert f"{100 * summary['accuracy']:.1f}" in result.stdout
    assert str(out) in result.stdout.replace("\n", "")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["rescale"], settings["malicious"], settings["clients"]) == (False, [1], 4)
    again = invoke("simulate", *TINY, "--out", str(out))
    assert again.exit_code == 1
    assert "already holds a run" in again.output
    assert invoke("simulate", "--resume", str(out)).exit_code == 0
    both = invoke("simulate", "--resume", str(out), "--rounds", "3")
    assert both.exit_code == 2
    assert "goes with no other flag" in both.output


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("rounds: 7\nlr: 0.5\nserver: fedavg\n")
    out = tmp_path / "run"
    result = invoke("simulate", "--config", str(file), *TINY, "--out", str(out))
    assert result.exit_code == 0, result.output
    config = SimulationConfig.from_yaml((out / "config.yaml").read_text())
    assert (config.rounds, config.lr, config.server) == (2, 0.5, "fedavg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "zeno"], "--server: expected one of fedavg, fdcr, coalition-fdcr, norm-clipping, "),
        (["--server", "fltrust"], "server: fltrust needs data of the server: set server_samples"),
        (["--server", "krum", "--num-byzantine", "4"], "krum with num_byzantine=4 needs at least 11 clients, got 10"),
        (["--dataset", "imagenet"], "--dataset: expected one of digits"),
        (["--clients", "3", "--malicious", "4,"], "malicious: no clients [4]"),
        (["--malicious", "5"], "'5'"),
        (["--trigger", "9:0"], "outside the 8x8 image"),
        (["--dataset", "mnist"], "--data-dir"),
        (["--lr", "fast", "--rounds", "0"], "--rounds: "),
        (["--lr", "fast", "--rounds", "0"], "--lr: "),
        (["--colour", "red"], "No such option"),
    ],
)
def test_bad_input_ends_in_a_message(arguments: list[str], message: str) -> None:
    result = invoke("simulate", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output


def test_unknown_settings_of_a_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 0.1\ndatset: digits\n")
    result = invoke("simulate", "--config", str(file))
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "Error: unknown setting 'learning_rate'",
        "unknown setting 'datset'; did you mean 'dataset'?",
    ]


def test_demo_compares_the_settings_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.name for row in commands.DEMO.rows] == ["FedAvg", "FLAME", "FDCR", "CoalitionFDCR", "oracle"]
    study = Path(__file__).parents[1] / "docs" / "studies" / "digits.yaml"
    if study.exists():  # in a checkout
        recorded = Study.from_yaml(study.read_text()).runs()
        assert all((run.row, run.config) in [(r.row, r.config) for r in recorded] for run in commands.DEMO.runs())

    def in_this_process(runs: list[Run], folder: Path, _: object, tell: StudyProgress) -> None:
        for run in runs:
            tell(StudyEvent(run))
            StudyRunFolder(folder / run.folder).execute(run.config)
            tell(StudyEvent(run, ended=True))

    monkeypatch.setattr(commands, "DEMO", commands.DEMO.model_copy(update={"base": {**commands.DEMO.base, **SMALL}}))
    monkeypatch.setattr(commands, "execute", in_this_process)
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    out = tmp_path / "demo"
    result = invoke("demo", "--out", str(out))
    assert result.exit_code == 0, result.output
    for row in commands.DEMO.rows:
        assert row.name in result.stdout
    assert (out / "attack-success.png").exists()
    assert "<svg" in (out / "attack-success.svg").read_text()
    monkeypatch.setattr(commands, "execute", lambda runs, *_: runs and pytest.fail("what had finished is run again"))
    assert invoke("demo", "--out", str(out)).exit_code == 0
    page = out / "report.html"
    assert str(page) in invoke("report", str(out)).stdout.replace("\n", "")
    assert "CoalitionFDCR" in page.read_text()


def test_an_interrupted_run_says_how_to_resume_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr(commands, "simulate", interrupted_in("fdcr"))
        kept, lost = invoke("simulate", *TINY, "--out", str(out)), invoke("simulate", *TINY)
    command = f"fdcr-fast simulate --resume '{out}'"
    assert (kept.exit_code, lost.exit_code) == (130, 130)
    assert f"Interrupted. Resume with: {command}\n" in kept.output
    assert "Interrupted. Nothing is kept of a run without --out." in lost.output
    assert invoke(*shlex.split(command)[1:]).exit_code == 0
    assert (out / "summary.json").exists()


def test_a_full_disk_is_said_with_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = invoke("simulate", *TINY, "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert result.output.splitlines()[-2:] == [
        f"Error: [Errno 28] No space left on device: '{tmp_path / 'run' / 'config.yaml'}'",
        "The run had not begun: start it anew.",
    ]


def test_a_dead_model_is_warned_of() -> None:
    dead = invoke("simulate", *TINY, "--lr", "1e30")
    assert dead.exit_code == 0
    assert "diverged" in dead.stdout
    assert "Warning: fdcr: in 2 of the last 2 rounds the global model has diverged" in dead.stderr
    alive = invoke("simulate", *TINY, "--lr", "0.1", "--local-epochs", "8", "--attack", "none")
    assert "Warning" not in alive.output
    assert "diverged" not in alive.output
    (row,) = [line for line in alive.stdout.splitlines() if "fdcr" in line]
    assert [cell.strip() for cell in row.split("│")[3:8]] == ["-"] * 5, "there is no attack to measure"


def test_info_needs_no_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__, "find_spec", lambda package: None if package == "pydantic" else object())
    monkeypatch.setattr(sys, "argv", ["fdcr-fast", "info"])
    __main__.main()
    assert capsys.readouterr().out.strip() == fdcr_fast.info().strip()
    monkeypatch.setattr(sys, "argv", ["fdcr-fast", "simulate"])
    with pytest.raises(SystemExit, match=r'simulate needs pydantic; .* pip install "fdcr_fast\[sim\]"'):
        __main__.main()


def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "fdcr_fast", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fdcr_fast.info().strip()
