"""The folder of a run: config.yaml, rounds.csv, clients.csv and others, and a checkpoint after every round."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.notation import explain
from fdcr_fast.sim.run.records import ClientRecord, RankRecord, RoundRecord, ScoreRecord, Summary
from fdcr_fast.sim.run.result import RunState

Record = TypeVar("Record", bound=BaseModel)

_WATCHED = "watched-"  # before the names of rules in a checkpoint


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors of the system say which file they are about, as those of writing to a full disk do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def content_of(path: Path) -> Iterator[None]:
    """Let errors in what a file holds say which file it is.

    Raises:
        ValueError: naming the file.
    """
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, flags=False)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: after a crash at any moment, or an error, it holds the old content or the new.

    Raises:
        OSError: naming the file, such as where the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _named(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def append_records(path: Path, records: Sequence[BaseModel]) -> int:
    """Add rows to a CSV file and return its new size; None is an empty cell.

    The file keeps the columns that it began with, which may be fewer than there are now. It begins with its first row.

    Raises:
        OSError: naming the file, such as where the disk is full; some of the rows may have been added.
    """
    if not records:
        return path.stat().st_size if path.exists() else 0
    with _named(path), path.open("a+", newline="") as file:
        file.seek(0)
        begun = csv.DictReader(file).fieldnames
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(
            file, begun or list(type(records[0]).model_fields), extrasaction="ignore", lineterminator="\n"
        )
        if not begun:
            writer.writeheader()
        writer.writerows(record.model_dump() for record in records)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def read_records(path: Path, record_type: type[Record], size: int | None = None) -> list[Record]:
    """Rows of a CSV file that :func:`append_records` wrote; columns that it lacks have their defaults.

    Args:
        path: The file; where there is none, no row was ever added.
        record_type: What a row holds.
        size: Bytes of the file that count, by default all.

    Raises:
        ValueError: it lacks a column without a default, or has one that is not known, or a cell is not valid.
    """
    fields = record_type.model_fields
    required = {name for name, field in fields.items() if field.is_required()}
    with content_of(path):
        text = path.read_bytes()[:size].decode() if path.exists() else ""
    if not text:
        return []
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not required <= set(reader.fieldnames or ()) <= set(fields):
        raise ValueError(f"{path} has other columns than this version of fdcr_fast writes: run it anew")
    with content_of(path):
        return [record_type.model_validate(row) for row in reader]


class RunFolder:
    """Files of one run.

    The CSV files only grow, and a checkpoint remembers how long they were. Resuming cuts them back to that,
    so a kill at any moment loses at most the round under way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.rounds_path = path / "rounds.csv"
        self.clients_path = path / "clients.csv"
        self.scores_path = path / "scores.csv"
        self.ranks_path = path / "ranks.csv"
        self.checkpoint_path = path / "checkpoint.npz"
        self.summary_path = path / "summary.json"

    def create(self, config: SimulationConfig) -> None:
        """Begin a run.

        Raises:
            FileExistsError: the folder holds a run already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config_path.exists():
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume, or choose another folder"
            )
        write_atomically(self.config_path, config.to_yaml().encode())

    def config(self) -> SimulationConfig:
        """The run's configuration.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: its configuration is not valid.
        """
        if not self.config_path.is_file():
            raise FileNotFoundError(f"{self.path} holds no run to resume: there is no config.yaml")
        with content_of(self.config_path):
            return SimulationConfig.from_yaml(self.config_path.read_text())

    @property
    def _tables(self) -> tuple[Path, ...]:
        """The files that only grow, in the order in which a checkpoint has their sizes."""
        return self.rounds_path, self.clients_path, self.scores_path, self.ranks_path

    def save(
        self,
        state: RunState,
        new_clients: Sequence[ClientRecord],
        new_scores: Sequence[ScoreRecord] = (),
        new_ranks: Sequence[RankRecord] = (),
    ) -> None:
        """Append the last round's records, then replace the checkpoint."""
        new: tuple[Sequence[BaseModel], ...] = (state.rounds[-1:], new_clients, new_scores, new_ranks)
        sizes = [append_records(path, records) for path, records in zip(self._tables, new, strict=True)]
        assert state.last_update is not None  # there was a round
        similarity = np.empty((0, 0)) if state.similarity is None else state.similarity.numpy()
        further: dict[str, Any] = {
            f"{_WATCHED}{name}": np.frombuffer(memory, np.uint8) for name, memory in state.watched.items()
        }
        if state.buffers is not None and state.buffers.numel():
            further["buffers"] = state.buffers.numpy()
        buffer = io.BytesIO()
        np.savez(
            buffer,
            params=state.params.numpy(),
            last_update=state.last_update.numpy(),
            csv_sizes=np.array(sizes, dtype=np.int64),
            similarity=similarity,
            memory=np.frombuffer(state.memory, np.uint8),
            **further,
        )
        write_atomically(self.checkpoint_path, buffer.getvalue())

    def load(self) -> RunState | None:
        """What :meth:`read` gives, to go on from there: rows of an unfinished round are removed."""
        state, sizes = self._read()
        for path, size in zip(self._tables, sizes, strict=True):
            if size:
                os.truncate(path, size)
            else:
                path.unlink(missing_ok=True)
        return state

    def read(self) -> RunState | None:
        """The state after the last checkpoint, None before the first.

        Raises:
            ValueError: the CSV files are shorter than when the checkpoint was made, or another version wrote them.
        """
        return self._read()[0]

    def _read(self) -> tuple[RunState | None, list[int]]:
        """The state, and how many bytes of each table belong to it."""
        if not self.checkpoint_path.exists():
            return None, [0] * len(self._tables)
        try:
            with np.load(self.checkpoint_path, allow_pickle=False) as arrays:
                params, last_update, similarity = (
                    torch.from_numpy(arrays[name]) for name in ("params", "last_update", "similarity")
                )
                sizes = arrays["csv_sizes"].tolist()
                memory = arrays["memory"].tobytes()
                names = [name for name in arrays.files if name.startswith(_WATCHED)]
                buffers = torch.from_numpy(arrays["buffers"]) if "buffers" in arrays else None
                watched = {name.removeprefix(_WATCHED): arrays[name].tobytes() for name in names}
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(f"{self.checkpoint_path} is damaged, or no checkpoint of a run: run it anew") from error
        sizes += [0] * (len(self._tables) - len(sizes))  # a checkpoint of before has two of them
        for path, size in zip(self._tables, sizes, strict=True):
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                raise ValueError(f"{path} has {found} bytes, its checkpoint expects at least {size}: cannot resume")
        state = RunState(
            params,
            read_records(self.rounds_path, RoundRecord, sizes[0]),
            read_records(self.clients_path, ClientRecord, sizes[1]),
            last_update,
            similarity if similarity.numel() else None,
            memory,
            read_records(self.scores_path, ScoreRecord, sizes[2]),
            read_records(self.ranks_path, RankRecord, sizes[3]),
            watched,
            buffers,
        )
        return state, sizes

    def save_model(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Write the global model after a round, a state dict."""
        from fdcr_fast.sim.training.files import model_bytes  # safetensors, which few runs need

        write_atomically(self.path / f"model-{round:05}.safetensors", model_bytes(state))

    def finish(self, summary: Summary) -> None:
        """Write the summary, which a finished run has."""
        write_atomically(self.summary_path, summary.model_dump_json(indent=2).encode() + b"\n")

    def summary(self) -> Summary:
        """The summary of a finished run.

        Raises:
            ValueError: it is not valid.
        """
        with content_of(self.summary_path):
            return Summary.model_validate_json(self.summary_path.read_text())
