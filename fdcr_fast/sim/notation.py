"""How values of settings may be written, on the command line and in YAML, and what is said of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import AfterValidator, ValidationError

from fdcr_fast.sim.attacks.schedule import parse_rounds
from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER, Pixels
from fdcr_fast.sim.imports import installed, is_path
from fdcr_fast.sim.names import NAMES, did_you_mean


class OneOf(AfterValidator):
    """Validator that a name is in a table; the command line reads ``choices`` for its help."""

    choices: tuple[str, ...]

    def __init__(self, *choices: str) -> None:
        def check(name: str) -> str:
            if name not in choices:
                raise ValueError(f"expected one of {', '.join(choices)}{did_you_mean(name, choices)}")
            return name

        super().__init__(check)
        object.__setattr__(self, "choices", choices)


class PartName(OneOf):
    """Validator that a name is in a table, is one that an installed package has added, or is an import path.

    What is imported is not looked at before a run begins.
    """

    def __init__(self, kind: str, *choices: str) -> None:
        def check(name: str) -> str:
            more = [other for other in installed(kind) if other not in choices]
            if name not in (*choices, *more) and not is_path(name):
                also = did_you_mean(name, (*choices, *more)) + f" (or {', '.join([*more, 'package.module:name'])})"
                raise ValueError(f"expected one of {', '.join(choices or more)}{also}")
            return name

        AfterValidator.__init__(self, check)
        object.__setattr__(self, "choices", choices)


def parse_none(value: object) -> object:
    """``"none"`` is None."""
    return None if value == "none" else value


def parse_auto(value: object) -> object:
    """``"auto"`` is None."""
    return None if value == "auto" else value


def parse_mapping(value: object) -> object:
    """Text is YAML, such as ``"{eps: 0.3}"``."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise ValueError("expected a mapping such as {eps: 0.3, min_samples: 3}") from None


def parse_names(value: object) -> object:
    """Text is names with commas."""
    return list(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def parse_rules(value: object) -> object:
    """Names of rules, in a list or with commas, or a mapping from names to options, which may be left empty."""
    if isinstance(value, str):
        value = parse_mapping(value) if "{" in value else parse_names(value)
    if isinstance(value, list | tuple):
        value = dict.fromkeys(value)
    return {name: options or {} for name, options in value.items()} if isinstance(value, Mapping) else value


def parse_spans(value: object) -> object:
    """Spans of rounds as text, which numbers and lists of YAML are made."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int) else value


def check_rounds(text: str) -> str:
    """Text that is spans of rounds; see :func:`fdcr_fast.sim.attacks.schedule.parse_rounds`."""
    parse_rounds(text)
    return text


def absolute(path: Path) -> Path:
    """The path, whatever folder a run is resumed in."""
    return path.expanduser().resolve()


def parse_malicious(value: object) -> object:
    """``"0.3"`` is a share, text with a comma lists clients: ``"0,3,7"``, and ``"2,"`` for client 2 alone."""
    if isinstance(value, str) and "," in value:
        return [index.strip() for index in value.split(",") if index.strip()]
    return value


def check_malicious(value: float | tuple[int, ...]) -> float | tuple[int, ...]:
    """A share of the clients, or different clients."""
    if isinstance(value, tuple):
        if len(set(value)) != len(value):
            raise ValueError("the list names a client twice")
    elif not 0 <= value < 1:
        raise ValueError("a share must be at least 0 and below 1; client indices have a comma, '2,' is client 2 alone")
    return value


def parse_participants(value: object) -> object:
    """``"all"``, ``"0.1"`` (a share) or ``"100"`` (a number): whatever has a decimal point is a share."""
    if value == "all":
        return None
    return float(value) if isinstance(value, str) and "." in value else value


def check_participants(value: int | float | None) -> int | float | None:
    """All clients, a number of them or a share."""
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("a share must be above 0 and below 1; all clients are 'all', one client is 1")
    return value


def parse_trigger(value: object) -> object:
    """``"paper"``, or pixels written ``"row:column,row:column"``."""
    if value == "paper":
        return PAPER_TRIGGER
    if isinstance(value, str):
        pixels = [pixel.split(":") for pixel in value.split(",")]
        if any(len(pixel) != 2 for pixel in pixels):
            raise ValueError("expected 'paper' or pixels as row:column,row:column")
        return pixels
    return value


def check_trigger(value: Pixels) -> Pixels:
    """At least one pixel."""
    if not value or min(min(pixel) for pixel in value) < 0:
        raise ValueError("expected at least one pixel, rows and columns counted from 0")
    return value


def check_dataset(name: str) -> str:
    """The name of a data set, a file's absolute path, or an import path."""
    if name.endswith(".npz"):
        return str(absolute(Path(name)))
    known = (*NAMES["datasets"], *installed("datasets"))
    if name in known or is_path(name):
        return name
    also = f"(or {', '.join([*installed('datasets'), 'package.module:name'])})"
    raise ValueError(
        f"expected one of {', '.join(NAMES['datasets'])} or a file FILE.npz{did_you_mean(name, known)} {also}"
    )


def explain(error: ValidationError, *, flags: bool = True) -> str:
    """One line for each field that is wrong, named as its flag or as it is."""
    lines: dict[str, list[str]] = {}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        where = (f"--{name.replace('_', '-')}: " if flags else f"{name}: ") if name else ""
        reason = item["msg"].removeprefix("Value error, ")
        reason += f" (got {item['input']!r})" if item["loc"] else ""
        lines.setdefault(where, []).append(reason)
    return "\n".join(where + "; or ".join(reasons) for where, reasons in lines.items())
