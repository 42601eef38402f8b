"""The benchmarks: that they measure what they say, and say what was measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare_commits, conftest, phases
from benchmarks.harness import Bench, Times
from benchmarks.machine import Load, Machine, watched
from benchmarks.tables import RESULTS, Report, Tables
from benchmarks.targets import Target, summary, verdict
from fdcr_fast import FDCR, FedAvg, UpdateStore

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The benchmarks with small rounds and one thread."""
    command = [sys.executable, "-m", "pytest", *arguments, "--quick", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_limits_are_measured_in_one_command(tmp_path):
    saved = tmp_path / "saved.json"
    chosen = "not (whole_rounds or grouped or transformer) or (10x1000000 and tensors)"
    result = run("benchmarks/limits", f"--results={tmp_path}", f"--benchmark-json={saved}", "-k", chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    (measured,) = json.loads((tmp_path / "limits.json").read_text())
    rows = measured["rows"]
    rounds = ("raw read, 1 threads", "FDCR, store", "FDCR, bfloat16 store", "put, one thread", "FLAME, tensors")
    for name in (*rounds, "Fisher, LeNet", "Fisher, mlp"):
        assert any(key.startswith(name) for key in rows), name
    assert "one reading" in rows["FDCR, store, K = 12, P = 20,000"]["figures"]["phases"]
    table = (tmp_path / "limits.md").read_text()
    assert str(Machine(**measured["machine"])) in table
    closing = table[table.index("targets reached") :]
    assert "The machine was" in closing
    for shown in ("FDCR, store, K 12, P 20,000, ms", "targets reached", "Name (time in"):
        assert shown in result.stdout, "rows are shown, and so is the table of pytest-benchmark"

    report = json.loads(saved.read_text())
    assert report["machine_info"]["fdcr_fast"] == measured["machine"]
    benchmarks = {each["name"]: each for each in report["benchmarks"]}
    put = benchmarks["test_put[10x1000000]"]
    (name, peer), times = next(iter(put["extra_info"]["peers"].items())), put["stats"]["data"]
    assert (name, len(peer["seconds"])) == ("copy", len(times))
    assert peer["times_ours"] == pytest.approx(statistics.median(peer["seconds"]) / statistics.median(times))
    low, high = peer["times_ours_quartiles"]
    ratios = [its / own for its, own in zip(peer["seconds"], times, strict=True)]
    assert min(ratios) <= low <= high <= max(ratios)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"results": RESULTS, "quick": True}, "no place for --quick"),
        ({"results": Path("tables"), "benchmark_disable": True}, "with --benchmark-disable"),
    ],
)
def test_tables_that_say_nothing_are_not_written(options, message):
    plain = {"results": None, "quick": False, "benchmark_disable": False, "threads": torch.get_num_threads()}
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**plain)))
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**plain | options)))


class Fixture:
    """What a benchmark uses of pytest-benchmark's fixture, which measures nothing under xdist."""

    def __init__(self, disabled):
        self.disabled, self.extra_info = disabled, {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, run, setup, rounds):
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            run()
            self.stats.stats.data.append(time.perf_counter() - start)


@pytest.mark.parametrize("disabled", [False, True])
def test_contenders_take_turns(disabled):
    calls = []

    def sleeping(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    fixture = Fixture(disabled)
    bench = Bench(fixture, 0.02, 3, refuse_busy=False, add=lambda *_: None)
    found = bench.compare({"ours": sleeping("ours", 0.001), "peer": sleeping("peer", 0.002)})
    assert calls[-4:] == ["peer", "ours", "peer", "ours"]
    rounds = {name: len(times.seconds) for name, times in found.times.items()}
    assert rounds["ours"] == rounds["peer"] >= (2 if disabled else 3)
    assert fixture.extra_info["peers"]["peer"]["times_ours"] == found.times["peer"].over(found.times["ours"]) > 1
    assert len(fixture.stats.stats.data) == (0 if disabled else rounds["ours"])


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(Load, "verdict", lambda self, spread: "others 1.0 cores")
    bench = Bench(Fixture(disabled=True), 0.01, 3, refuse_busy=True, add=lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match=r"the machine is busy: others 1\.0 cores"):
        bench.compare({"ours": lambda: time.sleep(0.001)})


def test_a_row_replaces_its_own_and_no_other(tmp_path, monkeypatch):
    said = []
    report = Report("name", "Title", "command", "Notes.", lambda rows: f"{len(rows)} rows.")

    def add(key, cell):
        tables = Tables(tmp_path, said.append)
        tables.add(report, key, {"": key, "cell": cell}, {"figure": cell})
        tables.close()

    add("a", "1")
    add("b", "2")
    here = Machine.this()
    monkeypatch.setattr(Machine, "this", lambda: replace(here, cpu="another"))
    add("a", "3")
    monkeypatch.undo()
    add("a", "4")
    mine, other = json.loads((tmp_path / "name.json").read_text())
    assert {key: row["figures"]["figure"] for key, row in mine["rows"].items()} == {"a": "4", "b": "2"}
    assert {key: row["figures"]["figure"] for key, row in other["rows"].items()} == {"a": "3"}
    text = (tmp_path / "name.md").read_text()
    assert text.index(str(here)) < text.index("| a | 4 |") < text.index("2 rows.") < text.index("another")
    assert said == ["a, cell 1", "1 rows.", "b, cell 2", "1 rows.", "a, cell 3", "1 rows.", "a, cell 4", "1 rows."]
    Tables(None, said.append).add(report, "c", {"": "c"}, {})
    assert "c" not in json.loads((tmp_path / "name.json").read_text())[0]["rows"]


def test_two_commits_are_compared_pair_by_pair():
    pairs = [({"a": 1.0, "b": 2.0, "gone": 1.0}, {"a": 1.2, "b": 2.0}), ({"b": 4.0, "a": 2.0}, {"a": 2.4, "b": 4.0})]
    slower, same = compare_commits.changes([*pairs, *pairs])
    assert (slower.name, same.name) == ("a", "b")
    assert slower.ratios.median == pytest.approx(1.2)
    assert (slower.verdict(1.05), same.verdict(1.05)) == ("slower", "")
    assert compare_commits.changes([(new, base) for base, new in pairs])[0].verdict(1.05) == "faster"
    noisy = compare_commits.changes([({"a": 1.0}, {"a": new}) for new in (1.02, 1.2, 1.3, 1.2)])
    assert noisy[0].verdict(1.05) == ""


def test_what_is_measured_is_the_library_of_the_commit(tmp_path):
    package = tmp_path / "one" / "fdcr_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace\nbackends = lambda: {'cpu': SimpleNamespace(reason='plain')}\n"
    )
    assert compare_commits.check(tmp_path / "one") == "plain"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fdcr_fast").symlink_to(package)
    with pytest.raises(RuntimeError, match="expected to import"):
        compare_commits.check(tmp_path / "other")


def test_bounds_and_verdicts():
    ours, yardstick = Times((2.0, 2.0, 4.0)), Times((1.0, 1.0, 1.0))
    assert Target(0.6).measured(ours, yardstick) == (0.5, 0.375, 0.5)
    assert Target(1.0, "multiple").measured(ours, yardstick) == (2, 2, 3)
    assert Target(0.3, "ms").measured(Times((1e-3, 1e-3)), yardstick) == (1, 1, 1)
    assert Target(0.6).excess(0.5) == pytest.approx(1.2)
    assert Target(1.0, "multiple").excess(2.0) == 2
    assert [str(Target(0.6)), str(Target(3, "ms"))] == [">= 0.6", "<= 3 ms"]
    assert verdict(0.9, {"mean": 1.0}) == "reached"
    assert verdict(1.2, {"mean": 1.0, "guess": 3.0}) == "missed: 1.20 x the time, 75 % of it guess"


def test_the_summary_names_what_was_missed_and_whether_the_machine_was_busy():
    rows = {
        "a": {"excess": 0.8, "busy": ""},
        "b": {"excess": 1.3, "busy": ""},
        "c": {"excess": 2.0, "busy": "others 0.7 cores"},
        "raw read": {"busy": ""},
    }
    text = summary(rows)
    assert "1 of 3 targets reached" in text
    assert "c (2.00 x); b (1.30 x)" in text
    assert "busy in 1 of 4 rows" in text
    assert "idle" in summary({"a": rows["a"]})


@pytest.mark.parametrize("rule", [FDCR(), FedAvg()], ids=["FDCR", "FedAvg"])
def test_phases_add_up_and_leave_the_library_as_it_was(rule):
    before = [vars(owner)[name] for _, owner, name in phases.POINTS]
    store = UpdateStore(20_000, 6)
    for k in range(6):
        store.put(torch.randn(20_000) * (1 + 9 * (k == 0)), torch.rand(20_000), 1)
    w = torch.zeros(20_000)
    walls = []

    def run():
        start = time.perf_counter()
        rule.aggregate(w, store)
        walls.append(time.perf_counter() - start)

    found = phases.phases(run, 1)
    assert {"take in", "screen", "result", "weigh", phases.REST} <= found.keys()
    assert ("guess" in found) == isinstance(rule, FDCR)
    assert min(found.values()) >= 0
    assert sum(found.values()) >= walls[0] * (1 - 1e-6)
    assert [vars(owner)[name] for _, owner, name in phases.POINTS] == before


def test_a_busy_machine_is_told():
    load = Load()
    assert load.verdict(spread=0.05) == ""
    load.others = 0.7
    assert load.verdict(spread=0.5) == "others 0.7 cores, yardstick ± 25 %"
    with watched() as load:
        pass
    assert load.others >= 0
