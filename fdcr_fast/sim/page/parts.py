"""What a page is made of, and how it becomes HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from matplotlib.figure import Figure

from fdcr_fast._version import __version__
from fdcr_fast.sim.run.drawing import rendered
from fdcr_fast.sim.run.report import Table


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows for those who do not see it."""

    figure: Figure
    alt: str

    @property
    def source(self) -> str:
        """The figure as a data URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(rendered(self.figure, 'svg')).decode()}"


@dataclass(frozen=True)
class Mark:
    """What became of a client in a round."""

    sign: str
    meaning: str


KEPT, DROPPED, REJECTED, MISSING, ABSENT = (
    Mark("\N{MIDDLE DOT}", "kept"),
    Mark("\N{MULTIPLICATION SIGN}", "dropped by the rule"),
    Mark("!", "rejected: its upload could not be used"),
    Mark("?", "sent nothing"),
    Mark("", "not drawn"),
)


@dataclass(frozen=True)
class Grid:
    """What became of some clients in all rounds.

    Attributes:
        rounds: The numbers of the columns.
        lines: For each client its name, whether it is malicious, and a mark for each round.
        left_out: How many clients are not shown.
    """

    rounds: Sequence[int]
    lines: Sequence[tuple[str, bool, Sequence[Mark]]]
    left_out: int

    marks = (KEPT, DROPPED, REJECTED, MISSING)


@dataclass(frozen=True)
class Section:
    """A part of a page: what it holds is shown in the order of the fields.

    Attributes:
        heading: What it is about.
        level: Of the heading, 2 for the parts of a page.
        folded: Whether tables and text are only shown when asked for.
        text: A paragraph.
        pictures: Figures.
        grid: What became of clients.
        tables: Captions and tables.
        code: Shown as it is.
    """

    heading: str
    level: int = 2
    folded: bool = False
    text: str = ""
    pictures: Sequence[Picture] = ()
    grid: Grid | None = None
    tables: Sequence[tuple[str, Table]] = ()
    code: str = ""


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: What was run.
        facts: Lines below the title.
        notices: What is wrong with it.
        sections: Everything else.
    """

    title: str
    facts: Sequence[str]
    notices: Sequence[str]
    sections: Sequence[Section]

    def to_html(self) -> str:
        """The page; all texts, some of which come from clients, are escaped."""
        return _template().render(page=self, version=__version__)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("fdcr_fast.sim.page", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
