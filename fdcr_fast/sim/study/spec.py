"""What a study runs: rows times settings times seeds, read from YAML and checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.names import check_keys, did_you_mean
from fdcr_fast.sim.notation import OneOf, explain
from fdcr_fast.sim.study.paper import SCALES, SHIPPED

FIGURES = ("summary", "rounds", "attack-success", "ranks", "clients", "similarity")  # which ``study.figures`` draws

HOW_ALONE = ("data_dir", "workers", "callbacks")  # fields that say how a run is made, and nothing of its results


class Setting(BaseModel):
    """A column of a study: a name, and fields of :class:`fdcr_fast.sim.SimulationConfig` beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """Everything but what describes the setting itself."""
        return self.model_extra or {}


class Row(Setting):
    """A row of a study; its fields win over those of the setting.

    Attributes:
        paper: What the paper reports, ``[A, R]`` in per cent in each of the study's settings; null where it does not.
    """

    paper: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Run:
    """One simulation of a study."""

    setting: str
    row: str
    config: SimulationConfig

    def __hash__(self) -> int:
        return hash((self.setting, self.row, self.folder))

    @property
    def label(self) -> str:
        """The run's name for people."""
        return ", ".join(filter(None, (self.setting, self.row, f"seed {self.config.seed}")))

    @cached_property
    def folder(self) -> str:
        """Name of the run's folder. It follows from what is run, so that studies share the runs they have in common.

        Fields at their defaults do not count, so a field that a later version adds leaves the names as they are;
        nor do the place of the data, the number of workers and what is told of the run.
        """
        fields = self.config.model_dump(mode="json", exclude_defaults=True, exclude=set(HOW_ALONE))
        digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=6).hexdigest()
        dataset = self.config.dataset.rpartition("/")[2]
        return f"{dataset}-{self.config.server}-seed{self.config.seed}-{digest}"


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [getattr(value, "name", value) for value in values]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"given twice: {', '.join(map(str, twice))}")
    return values


def _count_of_seeds(value: object) -> object:
    return range(value) if isinstance(value, int) else value


class Study(BaseModel):
    """Rows times settings times seeds.

    A run's fields are those of ``base``, of the scale, of its setting and of its row, later ones winning.

    Attributes:
        title: Heading of the report.
        note: Text below the heading.
        base: Fields of :class:`fdcr_fast.sim.SimulationConfig` common to all runs.
        settings: Every row is run in each of them.
        rows: What is compared.
        seeds: Seeds of every row in every setting: a list, or how many, counted from 0.
        figures: Drawn beside the tables: ``summary``, ``rounds`` and ``attack-success`` of all runs, ``ranks`` of those
            in which rules looked on, ``clients`` and ``similarity`` of each row's first seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Study"
    note: str = ""
    base: dict[str, Any] = Field(default_factory=dict)
    settings: Annotated[tuple[Setting, ...], Field(min_length=1), AfterValidator(_distinct)] = (Setting(name=""),)
    rows: Annotated[tuple[Row, ...], Field(min_length=1), AfterValidator(_distinct)]
    seeds: Annotated[
        tuple[NonNegativeInt, ...], BeforeValidator(_count_of_seeds), Field(min_length=1), AfterValidator(_distinct)
    ] = (0, 1, 2)
    figures: tuple[Annotated[str, OneOf(*FIGURES)], ...] = ("summary", "rounds")

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, entries: Any) -> Any:
        check_keys("entry", entries, cls.model_fields)
        return entries

    @classmethod
    def from_yaml(cls, text: str) -> Study:
        """Read a study.

        Raises:
            ValueError: not a YAML mapping, or an entry that no study has, naming it and the one that is most like it.
        """
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping with rows, got {type(content).__name__}")
        try:
            study = cls.model_validate(content)
        except ValidationError as error:
            raise ValueError("\n".join(map(_describe, error.errors()))) from error
        for row in study.rows:
            if row.paper and len(row.paper) != len(study.settings):
                raise ValueError(
                    f"row {row.name!r}: paper has {len(row.paper)} entries, expected one for each of the "
                    f"{len(study.settings)} settings"
                )
        return study

    @classmethod
    def shipped(cls, name: str) -> Study:
        """A study that comes with the library, by a name of :func:`fdcr_fast.sim.study.shipped_studies`."""
        return cls.from_yaml((SHIPPED / f"{name}.yaml").read_text())

    def runs(self, scale: str | None = None, overrides: Mapping[str, Any] | None = None) -> list[Run]:
        """All runs, setting by setting, row by row, seed by seed.

        Args:
            scale: A name in ``SCALES``.
            overrides: Fields that win over everything else.

        Raises:
            ValueError: fields that no simulation can have, naming the row and setting.
        """
        return [
            Run(setting.name, row.name, self._config(setting, row, seed, scale, overrides or {}))
            for setting in self.settings
            for row in self.rows
            for seed in self.seeds
        ]

    def _config(
        self, setting: Setting, row: Row, seed: int, scale: str | None, overrides: Mapping[str, Any]
    ) -> SimulationConfig:
        own = {**setting.fields, **row.fields, **overrides}
        dataset = str({**self.base, **own}.get("dataset"))
        scaled = SCALES[scale].get(dataset, {}) if scale is not None else {}
        try:
            return SimulationConfig.model_validate({**self.base, **scaled, **own, "seed": seed})
        except ValidationError as error:
            where = f"row {row.name!r}" + (f" in setting {setting.name!r}" if setting.name else "")
            raise ValueError(f"{where}: {explain(error)}") from error


def _describe(problem: ErrorDetails) -> str:
    """What is wrong with a study, after the place where it is."""
    return ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, "))))


def select(runs: Collection[Run], rows: Collection[str] = (), settings: Collection[str] = ()) -> list[Run]:
    """The runs of some rows and settings; of all where none is named.

    Raises:
        ValueError: an unknown name, with those that there are.
    """
    for kind, wanted, known in (
        ("row", rows, dict.fromkeys(run.row for run in runs)),
        ("setting", settings, dict.fromkeys(run.setting for run in runs)),
    ):
        for name in wanted:
            if name not in known:
                raise ValueError(
                    f"no {kind} {name!r}; there are {', '.join(map(repr, known))}{did_you_mean(name, known)}"
                )
    return [run for run in runs if (not rows or run.row in rows) and (not settings or run.setting in settings)]
