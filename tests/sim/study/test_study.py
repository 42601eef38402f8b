"""Studies: what they run, side by side, after kills and failures, and what they report."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from fdcr_fast import cli, commands
from fdcr_fast.sim import SimulationConfig, simulate
from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.run.metrics import summarize
from fdcr_fast.sim.study import SCALES, Study, StudyEvent, check, execute, pending, select, shipped_studies
from fdcr_fast.sim.study.figures import OF_A_RUN, OF_THE_STUDY, write_figures
from fdcr_fast.sim.study.pool import at_a_time
from fdcr_fast.sim.study.results import FinishedRun, StudyResults
from fdcr_fast.sim.study.spec import FIGURES
from tests.support.tiny import write_npz

TINY = {
    "title": "Tiny",
    "base": {
        "max_train_samples": 240,
        "max_test_samples": 100,
        "clients": 4,
        "malicious": [1],
        "rounds": 7,
        "local_epochs": 2,
        "lr": 0.1,
    },
    "rows": [
        {"name": "mean", "server": "fedavg", "paper": [[61.0, 7.5]]},
        {"name": "coalition", "server": "coalition-fdcr", "server_options": {"start": "bold"}},
    ],
    "seeds": [0, 3],
}


def study(**entries: Any) -> Study:
    return Study.from_yaml(yaml.safe_dump({**TINY, **entries}))


def results_csv(study: Study, folder: Path) -> list[dict[str, str]]:
    """Lines without what a repetition may change."""
    text = StudyResults.read(study, study.runs(), folder).to_csv()
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "date")}
        for line in csv.DictReader(io.StringIO(text))
    ]


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study, run one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    execute(study().runs(), folder, workers=1)
    return folder


def kill_children(spared: Collection[multiprocessing.process.BaseProcess] = ()) -> None:
    for child in set(multiprocessing.active_children()).difference(spared):
        child.kill()
        child.join()


def killed_study(folder: Path) -> None:
    """Process that is killed, with those it has started, after a round of a run, when others have finished."""

    def kill(event: StudyEvent) -> None:
        if event.run.row == "coalition" and event.progress and event.progress.record:
            kill_children()
            os.kill(os.getpid(), signal.SIGKILL)

    execute(study().runs(), folder, 2, kill)


def test_a_killed_study_resumes_to_the_same_results_with_any_number_of_workers(
    runs_folder: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "runs"
    process = multiprocessing.get_context("forkserver").Process(target=killed_study, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -9
    finished = {path: path.read_text() for path in killed.glob("*/origin.json")}
    begun = list(killed.glob("*coalition*/checkpoint.npz"))
    assert 1 <= len(finished) <= 3
    assert begun

    told: list[StudyEvent] = []
    execute(study().runs(), killed, 2, told.append)
    assert results_csv(study(), killed) == results_csv(study(), runs_folder)
    assert {path: path.read_text() for path in finished} == finished, "what had finished was run again"
    assert not {event.run.folder for event in told} & {path.parent.name for path in finished}
    rounds = [event.progress.round for event in told if event.progress and event.run.folder == begun[0].parent.name]
    assert rounds
    assert 1 not in rounds, "what had begun was not resumed"
    assert sum(event.ended for event in told) == 4 - len(finished)
    assert pending(study().runs(), killed) == []


def test_a_run_is_what_simulate_gives(runs_folder: Path) -> None:
    run = study().runs()[2]
    assert (run.row, run.config.seed, run.config.server) == ("coalition", 0, "coalition-fdcr")
    summary = simulate(run.config).summary.model_dump(exclude={"seconds", "phase_seconds", "peak_rss_bytes"})
    stored = json.loads((runs_folder / run.folder / "summary.json").read_text())
    assert {name: stored[name] for name in summary} == summary


def test_results_are_what_the_rounds_say(runs_folder: Path, tmp_path: Path) -> None:
    results = StudyResults.read(study(), study().runs(), runs_folder)
    results.write(tmp_path, "fdcr-fast study tiny.yaml")
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["server"], line["seed"]) for line in lines] == [
        ("mean", "fedavg", "0"),
        ("mean", "fedavg", "3"),
        ("coalition", "coalition-fdcr", "0"),
        ("coalition", "coalition-fdcr", "3"),
    ]
    assert "lr" not in lines[0], "only what differs has a column"
    columns: dict[str, list[float]] = {}
    for line in lines[:2]:
        with (runs_folder / line["folder"] / "rounds.csv").open() as file:
            rounds = list(csv.DictReader(file))[-5:]
        success = [float(record["attack_success_rate"]) for record in rounds]
        accuracy = np.mean([float(record["accuracy"]) for record in rounds])
        expected = {
            "accuracy": accuracy,
            "attack_success_rate": np.mean(success),
            "max_attack_success_rate": max(success),
            "backdoor_failure_rate": 1 - np.mean(success),
            "tradeoff": (accuracy + 1 - np.mean(success)) / 2,
            "true_positive_rate_all_rounds": 0,
            "false_positive_rate_all_rounds": 0,
        }
        for name, value in expected.items():
            assert float(line[name]) == pytest.approx(value)
            columns.setdefault(name, []).append(100 * float(line[name]))
        assert float(line["seconds"]) > 0
        assert line["machine"]
        assert line["date"][:2] == "20"
    assert "`fdcr-fast study tiny.yaml`" in (tmp_path / "results.md").read_text()
    row = next(text for text in (tmp_path / "results.md").read_text().splitlines() if text.startswith("| mean"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "2"
    for cell, values in zip(cells[2:7], list(columns.values())[:5], strict=True):
        assert cell == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert cells[-3:] == ["61.0", "7.5", "34.2"]


def test_which_rounds_count(runs_folder: Path) -> None:
    done = StudyResults.read(study(), study().runs(), runs_folder).finished[0]
    rounds = tuple(
        record.model_copy(
            update={
                "attack_success_rate": index / 10,
                "true_positive_rate": index / 10,
                "false_positive_rate": None if index == 0 else 1 / index,
            }
        )
        for index, record in enumerate(done.result.rounds)
    )
    result = replace(done.result, rounds=rounds, summary=summarize(rounds))
    measures = FinishedRun(done.run, result, done.origin).measures
    assert len(rounds) == 7
    assert measures["max_attack_success_rate"] == 0.6
    assert measures["true_positive_rate"] == pytest.approx((2 + 3 + 4 + 5 + 6) / 50)
    assert measures["true_positive_rate_all_rounds"] == pytest.approx(21 / 70)
    assert measures["false_positive_rate"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 5)
    assert measures["false_positive_rate_all_rounds"] == pytest.approx(2.45 / 6)


def test_every_figure_that_a_study_may_name_is_drawn() -> None:
    assert set(FIGURES) == set(OF_THE_STUDY) | set(OF_A_RUN)


def test_figures_of_a_study(runs_folder: Path, tmp_path: Path) -> None:
    drawn = study(figures=["summary", "rounds", "attack-success", "clients", "similarity"])
    write_figures(StudyResults.read(drawn, drawn.runs(), runs_folder), tmp_path)
    names = {"summary", "rounds", "attack-success"}
    names |= {f"{name}-{row}" for name in ("clients", "similarity") for row in ("mean", "coalition")}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    write_figures(StudyResults.read(drawn, drawn.runs(), runs_folder), tmp_path)
    assert {path: path.read_bytes() for path in before} == before, "the same figures are other bytes"
    write_figures(StudyResults.read(drawn, drawn.runs(), tmp_path / "none"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_failures_are_recorded_tried_again_and_stop_nobody(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    rows = [
        {"name": "no data", "dataset": str(file), "target": 0},
        {"name": "trigger", "trigger": "9:0"},
        {"name": "good", "server": "fedavg"},
        {"name": "killed", "server": "oracle"},
    ]
    failing = study(rows=rows, seeds=1, base={**TINY["base"], "model": "mlp"})

    others = multiprocessing.active_children()  # of other tests

    def kill(event: StudyEvent) -> None:
        if event.run.row == "killed" and event.progress:
            kill_children(spared=others)

    execute(failing.runs(), tmp_path / "runs", 1, kill)
    lines = {line["row"]: line for line in results_csv(failing, tmp_path / "runs")}
    assert f"no data file {file}" in lines["no data"]["error"]
    assert "outside the 8x8 image" in lines["trigger"]["error"]
    assert "exit code -9" in lines["killed"]["error"]
    assert lines["good"]["error"] == ""
    assert lines["good"]["accuracy"]
    report = StudyResults.read(failing, failing.runs(), tmp_path / "runs").to_markdown("command")
    assert "1 of 4 runs have finished" in report
    assert f"- no data, seed 0: FileNotFoundError: no data file {file}" in report

    write_npz(file, train=240)
    told: list[StudyEvent] = []
    execute(failing.runs(), tmp_path / "runs", 2, told.append)
    assert {event.run.row for event in told if event.ended and event.error} == {"trigger"}
    assert {event.run.row for event in told if event.ended and not event.error} == {"no data", "killed"}
    assert [line["row"] for line in results_csv(failing, tmp_path / "runs") if line["error"]] == ["trigger"]


def test_what_a_run_sets_in_its_process_is_no_other_runs(tmp_path: Path) -> None:
    base = {"dataset": "tests.support.users:data", "clients": 5, "rounds": 1, "local_epochs": 1}
    rows = [
        {"name": "leaves settings", "model": "tests.support.users:Leaving"},
        {"name": "finds them", "model": "tests.support.users:Residual"},
    ]
    both = study(base=base, rows=rows)
    execute(both.runs(), tmp_path / "together", workers=1)
    alone = Study.model_validate({**both.model_dump(), "rows": rows[1:]})
    execute(alone.runs(), tmp_path / "alone")
    found = results_csv(alone, tmp_path / "together")
    assert not any(line["error"] for line in found)
    assert found == results_csv(alone, tmp_path / "alone")


def test_runs_share_processes_to_the_same_bits(tmp_path: Path) -> None:
    noted = tmp_path / "processes"
    noted.mkdir()
    base = {
        "dataset": "tests.support.users:unseeded",
        "optimizer": "tests.support.users:noting",
        "optimizer_options": {"folder": str(noted)},
        "clients": 4,
        "rounds": 2,
        "local_epochs": 1,
        "workers": 2,
    }
    four = study(base=base, rows=[{"name": "mean", "server": "fedavg"}, {"name": "median", "server": "median"}])
    execute(four.runs(), tmp_path / "together", workers=1)
    trained, forked_from = zip(*(path.name.split("-") for path in noted.iterdir()), strict=True)
    assert len(set(trained)) <= 2, "runs do not share those who train"
    assert len(set(forked_from)) == 1, "runs do not share a process"

    last = Study.model_validate({**four.model_dump(), "rows": [four.rows[-1]], "seeds": [3]})
    execute(last.runs(), tmp_path / "alone")
    assert results_csv(last, tmp_path / "together") == results_csv(last, tmp_path / "alone")


def test_runs_with_processes_of_their_own_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for workers, expected in ((1, 4), (2, 2), (3, 1), (9, 1)):
        assert at_a_time(study(base={**TINY["base"], "workers": workers}).runs()) == expected
    assert at_a_time([]) == 4


def test_all_runs_are_tried_on_their_data_before_the_first_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_npz(tmp_path / "data.npz", train=240)
    loaded = []

    def load(name: str, data_dir: Path | None) -> Dataset:
        loaded.append(name)
        return load_dataset(name, data_dir)

    monkeypatch.setattr("fdcr_fast.sim.study.readiness.load_dataset", load)
    good = [{"name": "good"}, {"name": "file", "dataset": str(file)}]
    check(study(rows=good).runs())
    assert sorted(loaded) == sorted([str(file), "digits"]), "a data set was loaded twice"
    bad = {
        "target": ({"target": 10}, "target: class 10 does not exist"),
        "trigger": ({"trigger": "9:0"}, "outside the 8x8 image"),
        "model": ({"model": "cnn"}, "model: cnn needs images"),
        "clients": ({"clients": 100}, "100 clients with at least 10 samples"),
        "server data": ({"server": "fltrust", "server_samples": 240}, "would leave none to the clients"),
        "attack": ({"attack": "edge-case", "attack_file": str(tmp_path / "no.npz")}, "attack_file: no file"),
        "device": ({"device": "xpu" if torch.cuda.is_available() else "cuda"}, "device: no such device here"),
        "data": ({"dataset": "mnist"}, "give --data-dir"),
    }
    rows = [*good, *({"name": name, **fields} for name, (fields, _) in bad.items())]
    with pytest.raises(
        ValueError, match=f"nothing was run, as {2 * len(bad)} of {2 * len(rows)} runs cannot start"
    ) as error:
        check(study(rows=rows).runs())
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(bad)
    for name, (_, message) in bad.items():
        (line,) = [line for line in lines if line.startswith(f"- 2 runs ({name}, seed 0 and others): ")]
        assert message in line


def test_a_run_made_under_other_defaults_is_not_taken_for_this_one(runs_folder: Path, tmp_path: Path) -> None:
    runs = study().runs()[:1]
    folder = tmp_path / runs[0].folder
    folder.mkdir()
    for path in (runs_folder / runs[0].folder).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "batch_size": 32}))
    with pytest.raises(ValueError, match=r"defaults of batch_size were others: delete it"):
        StudyResults.read(study(), runs, tmp_path)
    (folder / "origin.json").unlink()
    execute(runs, tmp_path)
    assert "defaults of batch_size" in (folder / "error.txt").read_text()


def test_what_wins() -> None:
    layers = study(
        base={"dataset": "usps", "lr": 0.5, "rounds": 99, "clients": 7},
        settings=[{"name": "s", "lr": 0.2, "clients": 8, "momentum": 0.1}],
        rows=[{"name": "r", "clients": 9, "momentum": 0.2}],
        seeds=[4],
    )
    (plain,) = layers.runs()
    assert (plain.config.rounds, plain.config.lr, plain.config.clients, plain.config.seed) == (99, 0.2, 9, 4)
    (scaled,) = layers.runs("small", {"momentum": 0.3})
    assert scaled.config.rounds == SCALES["small"]["usps"]["rounds"]
    assert (scaled.config.lr, scaled.config.clients, scaled.config.momentum) == (0.2, 9, 0.3)
    assert (scaled.setting, scaled.row) == ("s", "r")


def test_names_of_runs_follow_from_what_is_run() -> None:
    def name(**fields: Any) -> str:
        (run,) = study(base=fields, rows=[{"name": "any"}], seeds=1).runs()
        return run.folder

    assert name() == name(rounds=50) == name(data_dir="/somewhere") == name(trigger="paper")
    for name_of_field, value in (
        ("rounds", 49),
        ("beta", 0.4),
        ("malicious", [1]),
        ("cluster", "none"),
        ("gate", True),
    ):
        assert name(**{name_of_field: value}) != name(), name_of_field
    assert name(server="oracle").startswith("digits-oracle-seed0-")
    assert study(seeds=3).seeds == (0, 1, 2)


def test_rows_that_are_the_same_run_once(tmp_path: Path) -> None:
    twins = study(rows=[{"name": "one", "server": "fedavg"}, {"name": "other", "server": "fedavg"}], seeds=1)
    assert len(pending(twins.runs(), tmp_path)) == 1


def test_selection() -> None:
    runs = study().runs()
    assert [run.row for run in select(runs, rows=["mean"])] == ["mean", "mean"]
    assert select(runs) == runs
    with pytest.raises(ValueError, match=r"no row 'meen'; there are 'mean', 'coalition'; did you mean 'mean'\?"):
        select(runs, rows=["meen"])
    with pytest.raises(ValueError, match=r"no setting 'beta'"):
        select(runs, settings=["beta"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"rows": [{"name": "bad", "servre": "fdcr"}]},
            r"row 'bad': unknown setting 'servre'; did you mean 'server'\?",
        ),
        ({"base": {"local-epochs": 3}}, r"row 'mean': unknown setting 'local-epochs'; did you mean 'local_epochs'\?"),
        ({"rows": [{"name": "bad", "server": "magic"}]}, r"row 'bad': --server: expected one of .* \(got 'magic'\)"),
        ({"rows": [{"name": "bad", "malicious": [9]}]}, r"row 'bad': malicious: no clients \[9\]"),
        ({"settings": [{"name": "here", "beta": -1}]}, "row 'mean' in setting 'here': --beta: "),
        ({"rows": [{"server": "fdcr"}]}, r"rows.0.name: Field required"),
        ({"rows": []}, "rows: "),
        ({"rows": [{"name": "twin"}, {"name": "twin"}]}, "rows: .*given twice: twin"),
        ({"rows": [{"name": "r", "paper": [[1, 2], [3, 4]]}]}, "row 'r': paper has 2 entries, expected .* 1 settings"),
        ({"seeds": [1, 1]}, "seeds: .*given twice: 1"),
        ({"seeds": 0}, "seeds: "),
        ({"figures": ["pie"]}, "figures.0: "),
        ({"colour": "red"}, "^unknown entry 'colour'$"),
        ({"titel": "Study"}, r"^unknown entry 'titel'; did you mean 'title'\?$"),
    ],
)
def test_bad_studies_are_refused_before_anything_runs(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**entries).runs()


def test_files_that_hold_no_study() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        Study.from_yaml("rows: [")
    with pytest.raises(ValueError, match="expected a mapping with rows, got list"):
        Study.from_yaml("- name: a")


def test_the_papers_tables_and_figures_are_shipped() -> None:
    assert shipped_studies() == ["figure1", "figure2", "figure3", "table1", "table2", "table3", "table4"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_valid_in_every_scale(name: str, scale: str) -> None:
    shipped = Study.shipped(name)
    runs = shipped.runs(scale)
    assert len(runs) == len(shipped.settings) * len(shipped.rows) * len(shipped.seeds)
    assert len({run.folder for run in runs}) == len(runs), "two rows are the same"
    paper = SimulationConfig()
    for run in runs:
        config = run.config
        assert config.dataset in SCALES[scale]
        assert config.max_train_samples is not None, "the scale does not know the data set"
        assert (config.clients, config.poison_share, config.target) == (10, 0.5, 2)
        assert {run.config.beta, 0.5, 0.3} == {0.5, 0.3}
        if scale == "paper":
            assert (config.rounds, config.local_epochs, config.lr) == (paper.rounds, paper.local_epochs, paper.lr)


def test_tables_agree_on_what_the_paper_reports() -> None:
    tables = {name: Study.shipped(name) for name in ("table1", "table2", "table3", "table4")}
    rows = {name: {row.name: row.paper for row in table.rows} for name, table in tables.items()}
    assert rows["table1"]["FINCH"] == rows["table3"]["FCDC and FPRA"] == rows["table4"]["FDCR"][:4]
    assert rows["table2"]["with importance"] == rows["table3"]["FCDC"][:2]
    assert rows["table3"]["neither"] == rows["table4"]["FedAvg"][:4]


def test_what_rules_that_looked_on_said_of_all_runs(tmp_path: Path) -> None:
    rows = [{"name": "own", "server": "coalition-fdcr"}, {"name": "oracle", "server": "oracle"}]
    watching = study(
        base={**TINY["base"], "rounds": 3, "watch": ["coalition-fdcr", "fdcr"]},
        rows=[*rows, {"name": "blind", "server": "fedavg", "watch": []}],
        seeds=[3],
        figures=["ranks"],
    )
    execute(watching.runs(), tmp_path / "runs", 2)
    results = StudyResults.read(watching, watching.runs(), tmp_path / "runs")
    results.write(tmp_path, "command")
    write_figures(results, tmp_path)
    assert (tmp_path / "ranks.png").exists()
    for name in ("ranks", "scores"):
        lines = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
        expected = [
            {"row": done.run.row, "seed": "3", **{key: "" if value is None else str(value) for key, value in record}}
            for done in results.finished
            for record in getattr(done.result, name)
        ]
        assert [{key: line[key] for key in expected[0]} for line in lines] == expected
        assert {line["row"] for line in lines} == {"own", "oracle"}
    table = [line.split(" | ") for line in (tmp_path / "results.md").read_text().splitlines() if " | 3 | " in line]
    assert [line[0] for line in table] == ["| own", "| own", "| oracle", "| oracle"]
    assert [line[2] for line in table] == ["coalition-fdcr", "fdcr"] * 2
    for line, done in ((table[0], results.finished[0]), (table[2], results.finished[1])):
        assert line[4] == "rank of 4"
        said = [str(record.set_rank) for record in done.result.ranks if record.rule == "coalition-fdcr"]
        assert [cell.rstrip(" |") for cell in line[5:]] == said
    areas = [record.area_under_curve for record in results.finished[1].result.ranks if record.rule == "fdcr"]
    assert [cell.rstrip(" |") for cell in table[3][4:]] == ["AUC", *(f"{area:.2f}" for area in areas)]
    titles = [axes.get_title() for axes in OF_THE_STUDY["ranks"](results).axes if axes.get_title()]
    assert titles == [f"{row}, seed 3: {rule}" for row in ("own", "oracle") for rule in ("coalition-fdcr", "fdcr")]


def test_the_command_runs_a_study_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**TINY, "rows": [*TINY["rows"], {"name": "bad", "trigger": "9:0"}]}))
    arguments = ["study", str(file), "--out", str(out), "--workers", "2", "--seeds", "1"]
    done = CliRunner().invoke(cli.cli, [*arguments, "--row", "mean"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "1 of 3 runs have finished" in done.output
    figures = {f"{name}.{form}" for name in ("summary", "rounds") for form in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {
        "runs",
        "study.json",
        "results.csv",
        "results.md",
        "report.html",
    } | figures
    (row,) = [line for line in done.stdout.splitlines() if "mean" in line and "│" in line]
    assert row.split("│")[2].strip() == "1", "of one seed"
    assert "`fdcr-fast study study.yaml --out DIR --seeds 1`" in (out / "results.md").read_text()
    bad = [*arguments, "--row", "bad"]
    refused = CliRunner().invoke(cli.cli, bad, catch_exceptions=False)
    assert refused.exit_code == 1
    assert "nothing was run, as 1 of 1 runs cannot start:\n- bad, seed 0: trigger: pixels" in refused.output
    assert len(list((out / "runs").iterdir())) == 1
    monkeypatch.setattr(commands, "check", lambda runs: None)
    failed = CliRunner().invoke(cli.cli, bad, catch_exceptions=False)
    assert failed.exit_code == 1
    assert "1 runs failed" in failed.output
    unknown = CliRunner().invoke(cli.cli, [*arguments, "--row", "median"], catch_exceptions=False)
    assert unknown.exit_code == 1
    assert "no row 'median'" in unknown.output


def test_dead_models_are_listed(runs_folder: Path, tmp_path: Path) -> None:
    results = StudyResults.read(study(), study().runs(), runs_folder)
    assert results.dead == []
    assert "Dead models" not in results.to_markdown("command")
    first = results.finished[0]
    rounds = [record.model_copy(update={"problem": "constant"}) for record in first.result.rounds]
    dead = replace(first, result=replace(first.result, summary=summarize(rounds)))
    results = replace(results, finished=(dead, *results.finished[1:]))
    assert results.dead == [dead]
    assert (
        "- mean, seed 0: in 5 of the last 5 rounds the global model predicts one class for all test images"
        in results.to_markdown("command").splitlines()
    )
    assert [line["global_model"] for line in csv.DictReader(io.StringIO(results.to_csv()))] == [
        "constant 5/5",
        *["ok"] * 3,
    ]


def test_an_interrupted_study_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "execute", interrupt)
    file = tmp_path / "my study.yaml"
    file.write_text(yaml.safe_dump(TINY))
    done = CliRunner().invoke(cli.cli, ["study", str(file), "--out", str(tmp_path / "out"), "--seeds", "1"])
    assert done.exit_code == 130
    assert "Interrupted. Finished runs are kept" in done.output
    assert f"the same command: fdcr-fast study '{file}' --out {tmp_path / 'out'} --seeds 1" in done.output


def test_tables_of_many_runs_are_not_written_after_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], StudyResults.write

    def counted(results: StudyResults, out: Path, command: str) -> None:
        written.append(len(results.finished))
        write(results, out, command)

    monkeypatch.setattr(StudyResults, "write", counted)
    monkeypatch.setattr(commands, "_RARELY", 1e9)
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(TINY))
    arguments = ["study", str(file), "--out", str(out), "--workers", "1", "--seeds", "2"]
    done = CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    runs = len(study().rows) * 2
    assert written == [0, 1, runs]
    assert (out / "results.csv").read_text().count("digits-") == runs


def test_reproducing_without_data_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "execute", lambda *_: pytest.fail("there are no data"))
    done = CliRunner().invoke(cli.cli, ["reproduce", "table2", "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 1
    assert "nothing was run, as 12 of 12 runs cannot start" in done.output
    assert done.output.count("cifar10: give --data-dir") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_reproduces_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "cifar10.npz", shape=(32, 32, 3), train=200)
    monkeypatch.setitem(SCALES["small"], "cifar10", {"rounds": 1, "local_epochs": 1})
    out = tmp_path / "out"
    arguments = ["--data-dir", str(tmp_path), "--out", str(out), "--row", "FedAvg"]
    for name in ("figure1", "table4"):
        more = ["--leak", "--setting", Study.shipped(name).settings[0].name, "--seeds", "1"]
        done = CliRunner().invoke(cli.cli, ["reproduce", name, *arguments, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert (out / f"{name}-small-leak" / "results.md").exists()
    (run,) = (out / "runs").iterdir()  # both are the same run
    config = SimulationConfig.from_yaml((run / "config.yaml").read_text())
    assert (config.dataset, config.attacker_fisher, config.rounds) == ("cifar10", "random", 1)
    assert (out / "figure1-small-leak" / "similarity-cifar-10-beta-0.5-fedavg.png").exists()
