"""The paper's tables and figures as studies that come with the library, and in which sizes they can be run."""

from __future__ import annotations

from importlib import resources
from typing import Any

# Fields by data set that lie over a study's own ``base``. "paper" is the paper's setting: of every training set it puts
# a tenth aside; all else are the defaults. "small" takes half a minute to a minute per run on one core.
_SMALL = {"max_train_samples": 6000, "max_test_samples": 2000, "local_epochs": 5, "rounds": 12}
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "cifar10": {**_SMALL, "lr": 0.03},
        "fashion-mnist": {**_SMALL, "lr": 0.02},
        "usps": {**_SMALL, "lr": 0.01},
    },
    "paper": {
        "cifar10": {"max_train_samples": 45_000},
        "fashion-mnist": {"max_train_samples": 54_000},
        "usps": {"max_train_samples": 6_561},
    },
}

SHIPPED = resources.files("fdcr_fast.sim.study") / "shipped"


def shipped_studies() -> list[str]:
    """Names of the studies that come with the library: the paper's tables and figures."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml"))
