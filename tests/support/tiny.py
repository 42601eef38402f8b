"""Small problems for the tests of the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fdcr_fast.sim import RoundRecord, SimulationConfig, SimulationResult


def tiny_config(**fields: Any) -> SimulationConfig:
    """Two rounds of four clients on 240 digits."""
    defaults: dict[str, Any] = {
        "max_train_samples": 240,
        "max_test_samples": 100,
        "clients": 4,
        "malicious": (1,),
        "rounds": 2,
        "local_epochs": 1,
        "lr": 0.05,
    }
    return SimulationConfig(**{**defaults, **fields})


def without_costs(result: SimulationResult) -> list[dict[str, object]]:
    """The records of all rounds, but for the time and memory that they took."""
    costs = {name for name in RoundRecord.model_fields if name.endswith("seconds")} | {"peak_rss_bytes"}
    return [record.model_dump(exclude=costs) for record in result.rounds]


def write_npz(path: Path, shape: tuple[int, ...] = (16, 16), train: int = 60, test: int = 20, **arrays: Any) -> Path:
    """An archive of random uint8 images of three classes; keywords replace or (None) omit arrays."""
    rng = np.random.default_rng(0)
    contents = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 3,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % 3,
    }
    contents |= arrays
    np.savez(path, **{name: array for name, array in contents.items() if array is not None})
    return path
