"""The folder of one run of a study: run it, resume it, remember how it ended, read it back."""

from __future__ import annotations

import fcntl
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from fdcr_fast._version import __version__
from fdcr_fast.ops.backends import cpu_model
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.folder import RunFolder, write_atomically
from fdcr_fast.sim.run.result import Progress, SimulationResult
from fdcr_fast.sim.run.simulation import resume, simulate
from fdcr_fast.sim.study.spec import HOW_ALONE


class Origin(BaseModel):
    """Contents of origin.json, which marks a finished run: where, when and with what it was made."""

    model_config = ConfigDict(frozen=True)

    machine: str
    date: str
    torch: str
    fdcr_fast: str

    @classmethod
    def here_and_now(cls) -> Origin:
        """This machine and installation, the time in UTC."""
        return cls(
            machine=cpu_model(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            torch=torch.__version__,
            fdcr_fast=__version__,
        )


class StudyRunFolder:
    """Files of one run: those of :class:`fdcr_fast.sim.run.folder.RunFolder`, and how it ended.

    ``origin.json`` is there once the run has finished, ``error.txt`` if it failed the last time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error_path = path / "error.txt"
        self.origin_path = path / "origin.json"

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.origin_path.exists()

    @property
    def error(self) -> str | None:
        """Last line of what made the run fail, None if it has not failed."""
        return self.error_path.read_text().strip().splitlines()[-1] if self.error_path.exists() else None

    def fail(self, text: str) -> None:
        """Record that the run failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.error_path, f"{text}\n".encode())

    def result(self, config: SimulationConfig) -> SimulationResult:
        """What a finished run gave.

        Raises:
            ValueError: it was run with other fields.
        """
        folder = RunFolder(self.path)
        found = _check_same(folder, config)
        state = folder.read()
        assert state is not None
        return state.result(found, folder.summary())

    def origin(self) -> Origin:
        """Where, when and with what a finished run was made."""
        return Origin.model_validate_json(self.origin_path.read_text())

    def execute(self, config: SimulationConfig, progress: Progress | None = None) -> None:
        """Run or resume it unless it has finished; an exception is recorded in error.txt, not raised.

        Another process that executes the same run is waited for.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                if self.finished:
                    return
                self.error_path.unlink(missing_ok=True)
                if self._begun(config):
                    resume(self.path, progress)
                else:
                    simulate(config, self.path, progress)
                write_atomically(self.origin_path, Origin.here_and_now().model_dump_json(indent=2).encode() + b"\n")
        except BrokenPipeError:  # from progress: whoever started this run is gone
            pass
        except Exception:
            self.fail(traceback.format_exc())

    def _begun(self, config: SimulationConfig) -> bool:
        """Whether there is something to resume; it will look for the data where ``config`` says."""
        folder = RunFolder(self.path)
        if not folder.config_path.exists():
            return False
        _check_same(folder, config)
        write_atomically(folder.config_path, config.to_yaml().encode())
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _check_same(folder: RunFolder, config: SimulationConfig) -> SimulationConfig:
    """The fields of a folder's run; its name tells only those that are not at their defaults.

    Raises:
        ValueError: they are others.
    """
    found = folder.config()
    had, wanted = (each.model_dump(exclude=set(HOW_ALONE)) for each in (found, config))
    changed = [name for name in wanted if wanted[name] != had[name]]
    if changed:
        raise ValueError(f"{folder.path} was run when the defaults of {', '.join(changed)} were others: delete it")
    return found
