"""Pages of runs and studies: everything that was recorded is there, and nothing comes from elsewhere."""

from __future__ import annotations

import base64
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fdcr_fast.sim import SimulationResult, simulate
from fdcr_fast.sim.page.parts import DROPPED, KEPT, MISSING, REJECTED
from fdcr_fast.sim.page.run import run_page
from fdcr_fast.sim.page.write import write_page
from fdcr_fast.sim.run import figures
from fdcr_fast.sim.run.metrics import MEASURES
from fdcr_fast.sim.run.report import percent
from fdcr_fast.sim.study import Study
from fdcr_fast.sim.study.folder import StudyRunFolder
from fdcr_fast.sim.study.record import StudyRecord
from tests.support.tiny import tiny_config

HOSTILE = "<script>alert('x')</script> & \"quotes\" for $\\frac{$"
VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """What a page consists of; it fails where elements are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def checked(text: str) -> Parsed:
    """A page that loads nothing, runs nothing, and can be read by those who do not see it."""
    page = Parsed(text)
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "link", "iframe", "object", "embed", "base", "form"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}
        assert attributes.get("href", "#")[0] == "#"
        assert attributes.get("href", "#")[1:] in {"", *ids}
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import", text)
    for image in page.attributes("img"):
        assert image["alt"]
        picture = ElementTree.fromstring(base64.b64decode(image["src"].split("base64,")[1]))
        links = [value for part in picture.iter() for name, value in part.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    assert all("scope" in attributes for attributes in page.attributes("th"))
    assert tags["caption"] == tags["table"]
    assert [attributes["lang"] for attributes in page.attributes("html")] == ["en"]
    return page


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    return simulate(tiny_config(server="coalition-fdcr", watch="fdcr", rounds=3))


def test_a_run_with_what_clients_may_send(result: SimulationResult) -> None:
    rejected = result.clients[-1].model_copy(update={"kept": False, "reason": HOSTILE})
    missing = result.clients[-2].model_copy(update={"kept": False, "sent": False, "reason": "it is late"})
    changed = replace(result, clients=(*result.clients[:-2], missing, rejected))
    text = run_page(changed, HOSTILE).to_html()
    page = checked(text)
    assert page.text.count(HOSTILE) == 2, "the folder's name and the reason"
    assert "it is late" in page.cells
    for measure in MEASURES.values():
        place = page.cells.index(measure.heading)
        assert page.cells[place + 1] == percent(measure(result.rounds))
    assert len(page.attributes("img")) == 4
    for record in result.rounds:
        assert percent(record.accuracy) in page.cells
    dropped = [record for record in changed.clients if record.sent and not record.kept and not record.reason]
    assert dropped
    for record in dropped:
        assert "similarity " in record.explanation
        assert record.explanation in page.cells
        assert f"{record.discrepancy:.3g}" in page.cells
    grid = Counter(attributes["title"] for attributes in page.attributes("td") if "title" in attributes)
    kept = sum(record.kept for record in changed.clients)
    assert grid == {
        mark.meaning: count for mark, count in ((KEPT, kept), (DROPPED, len(dropped)), (REJECTED, 1), (MISSING, 1))
    }
    for record in result.scores[-4:]:
        assert f"{record.score:.4g}" in page.cells
    assert "server: coalition-fdcr" in page.text
    assert "0.05" in page.cells, "the learning rate is not the default"


def test_a_run_that_goes_on_is_read_and_left_as_it_is(
    result: SimulationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="holds neither a run"):
        write_page(tmp_path, tmp_path / "page.html")
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    simulate(tiny_config(), folder)
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("rounds: 2", "rounds: 5"))
    with (folder / "rounds.csv").open("a") as file:
        file.write("3,0.5")  # a row that is being written
    before = {path: path.read_bytes() for path in folder.iterdir()}
    page = checked(write_page(folder, tmp_path / "pages" / "page.html").read_text())
    assert "2 of 5 rounds are done" in page.text
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_config(max_train_samples=120).model_dump(mode="json", exclude_defaults=True)
    rows = [{"name": f"mean {HOSTILE}", "server": "fedavg"}, {"name": "oracle", "server": "oracle"}, {"name": "late"}]
    study = Study.model_validate({"title": HOSTILE, "base": base, "rows": rows, "seeds": 1, "figures": ["summary"]})
    record = StudyRecord.of(study, "the command", "../runs", seeds=2)
    out = tmp_path / "out"
    record.write(out)
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    for run in record.runs()[:4]:
        StudyRunFolder(tmp_path / "runs" / run.folder).execute(run.config)
    StudyRunFolder(tmp_path / "runs" / record.runs()[4].folder).fail("Error: <b>no memory</b>")
    page = checked(write_page(out, out / "report.html").read_text())
    assert "late, seed 0 failed: Error: <b>no memory</b>" in page.text
    assert "the command --seeds 2" in page.text
    results = record.results(out)
    assert len(results.finished) == 4
    assert "The study has not finished: 4 of 6 runs are done." in page.text
    for line in results.table("").lines:
        assert set(line) <= set(page.cells)
    for done in results.finished:
        assert done.run.folder in page.cells
        for name in ("accuracy", "attack_success_rate"):
            assert percent(done.measures[name]) in page.cells
    assert f"mean {HOSTILE}, seed 0: who was dropped when" in page.text
    assert len(page.attributes("img")) == 1
