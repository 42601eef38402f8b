"""What a user's own code is told of a run as it goes on, such as a logger, and what becomes of its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.imports import SHIPPED, imported, one_line, title
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord
from fdcr_fast.sim.run.result import SimulationResult


class PartError(RuntimeError):
    """A part of the user's has failed in the midst of a run, whose finished rounds are kept."""


@dataclass(frozen=True)
class FinishedRound:
    """A round whose results are kept.

    Attributes:
        record: Its figures.
        clients: What became of each client drawn.
        state: A function that returns a copy of the global model after it, a state dict.
    """

    record: RoundRecord
    clients: Sequence[ClientRecord]
    state: Callable[[], Mapping[str, Tensor]]


class Callback:
    """Something that is told how a run goes: a subclass has those of these methods that it wants.

    It is called in the process that writes, after a round has been written down. An exception ends the run as
    :class:`PartError`, and no finished round is lost.
    """

    def on_start(self, config: SimulationConfig, folder: Path | None, finished: int) -> None:
        """A run begins or goes on.

        Args:
            config: What is run.
            folder: Where its results are; None where nothing is kept.
            finished: Number of rounds that had been finished before, 0 for a new run.
        """

    def on_round(self, round: FinishedRound) -> None:
        """A round has ended."""

    def on_end(self, result: SimulationResult) -> None:
        """The run has ended well, and all files are written."""


class Callbacks:
    """Several of them, one after the other: those that a configuration names, and then those that are given.

    Raises:
        TypeError: they are no sequence, or one is no :class:`Callback`.
    """

    def __init__(self, named: Sequence[Callback] = (), given: Sequence[Callback] = ()) -> None:
        if not isinstance(given, Iterable):
            raise TypeError(f"callbacks: expected a sequence of them, got {given!r}")
        callbacks = *named, *given
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(
                    f"callbacks: expected objects of subclasses of fdcr_fast.sim.Callback, got {callback!r}"
                )
        self._callbacks = callbacks

    def tell(self, hook: str, *event: Any) -> None:
        """Call a method of each.

        Raises:
            PartError: one has raised an exception.
        """
        for callback in self._callbacks:
            with users_code(f"callback {title(callback)}, {hook}"):
                getattr(callback, hook)(*event)


def named_callbacks(config: SimulationConfig) -> list[Any]:
    """Those that a configuration names, each called without arguments.

    Raises:
        ValueError: one cannot be imported, such as a logger whose extra is not installed.
    """
    return [_named(name) for name in config.callbacks]


def _named(name: str) -> Any:
    try:
        return imported("callbacks", name)()
    except ValueError as error:
        advice = f"; pip install 'fdcr_fast[{name}]'" if name in SHIPPED["callbacks"] else ""
        raise ValueError(f"callbacks: {error}{advice}") from error


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Let an exception in the block say whose it is.

    Raises:
        PartError: instead of any other exception.
    """
    try:
        yield
    except Exception as error:
        raise PartError(f"{what}: {one_line(error)}") from error
