"""What a folder with the results of a study remembers of it, so that they can be read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from fdcr_fast.sim.run.folder import content_of, write_atomically
from fdcr_fast.sim.study.results import StudyResults
from fdcr_fast.sim.study.spec import Run, Study

_NAME = "study.json"


class StudyRecord(BaseModel):
    """Contents of study.json.

    Attributes:
        study: What was asked for.
        command: The command that executes it.
        scale: A name in ``SCALES``, which the runs have.
        overrides: Fields that won over everything else.
        runs_folder: Of the runs, from the folder of the results.
    """

    model_config = ConfigDict(frozen=True)

    study: Study
    command: str
    scale: str | None
    overrides: dict[str, Any]
    runs_folder: str

    @classmethod
    def of(
        cls,
        study: Study,
        command: str,
        runs_folder: str,
        *,
        scale: str | None = None,
        seeds: int | None = None,
        data_dir: Path | None = None,
        overrides: Mapping[str, Any] = MappingProxyType({}),
    ) -> StudyRecord:
        """A study with so many seeds, counted from 0, and with data from a folder, where these are given."""
        fields = dict(overrides)
        if seeds is not None:
            study = study.model_copy(update={"seeds": tuple(range(seeds))})
            command += f" --seeds {seeds}"
        if data_dir is not None:
            fields["data_dir"] = str(data_dir)
        return cls(study=study, command=command, scale=scale, overrides=fields, runs_folder=runs_folder)

    @classmethod
    def recorded(cls, out: Path) -> bool:
        """Whether there is one in a folder."""
        return (out / _NAME).is_file()

    @classmethod
    def read(cls, out: Path) -> StudyRecord:
        """The one in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not valid.
        """
        with content_of(out / _NAME):
            return cls.model_validate_json((out / _NAME).read_bytes())

    def write(self, out: Path) -> None:
        """Keep it in a folder."""
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / _NAME, self.model_dump_json(indent=1).encode() + b"\n")

    def runs(self) -> list[Run]:
        """All runs of the study.

        Raises:
            ValueError: see :meth:`Study.runs`.
        """
        return self.study.runs(self.scale, self.overrides)

    def results(self, out: Path) -> StudyResults:
        """Everything that the runs say which have finished or failed.

        Raises:
            ValueError: see :meth:`StudyResults.read`.
        """
        return StudyResults.read(self.study, self.runs(), out / self.runs_folder)
