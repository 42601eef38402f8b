"""Whether all runs of a study can start, before the first one does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.imports import is_users
from fdcr_fast.sim.parts import Parts
from fdcr_fast.sim.study.spec import Run
from fdcr_fast.sim.task import Task
from fdcr_fast.sim.training.stacked_model import usable_device


def check(runs: Sequence[Run]) -> None:
    """Load every data set once, and try every run's configuration on it without training anything.

    Raises:
        ValueError: naming the runs that cannot start, and why.
    """
    reasons: dict[str, list[Run]] = {}
    for _, group in groupby(sorted(runs, key=_source), _source):
        on_it = list(group)
        try:
            dataset = _dataset(on_it[0].config).without_pixels()
        except (TypeError, ValueError, OSError) as error:
            reasons.setdefault(str(error), []).extend(on_it)
            continue
        for run in on_it:
            if reason := _obstacle(run.config, dataset):
                reasons.setdefault(reason, []).append(run)
    if reasons:
        failing = sum(map(len, reasons.values()))
        lines = [f"- {_some(failed)}: {reason}" for reason, failed in reasons.items()]
        raise ValueError("\n".join([f"nothing was run, as {failing} of {len(runs)} runs cannot start:", *lines]))


def _dataset(config: SimulationConfig) -> Dataset:
    if is_users("datasets", config.dataset):
        return Parts.of(config).dataset(config)
    return load_dataset(config.dataset, config.data_dir)


def _obstacle(config: SimulationConfig, dataset: Dataset) -> str | None:
    """Why a run cannot start on a data set."""
    try:
        usable_device(config.device)
        Task.of(config, dataset).build()
    except (TypeError, ValueError, OSError) as error:
        return str(error)
    return None


def _source(run: Run) -> tuple[str, ...]:
    config = run.config
    own = (str(config.dataset_options), str(config.clients)) if is_users("datasets", config.dataset) else ()
    return config.dataset, str(config.data_dir), *own


def _some(runs: Sequence[Run]) -> str:
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs ({runs[0].label} and others)"
