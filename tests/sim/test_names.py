from __future__ import annotations

import pytest

from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS
from fdcr_fast.rules.fdcr.discrepancy import SCORES
from fdcr_fast.rules.table import RULES
from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS
from fdcr_fast.sim.attacks.poison import ATTACKS
from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES
from fdcr_fast.sim.datasets.readers import DATASETS
from fdcr_fast.sim.datasets.splits import PARTITIONS
from fdcr_fast.sim.names import NAMES, check_keys, did_you_mean
from fdcr_fast.sim.servers import INFORMED_BASELINES
from fdcr_fast.sim.training.models import MODELS

KNOWN = ("multi-krum", "local_epochs", "mnist", "fashion-mnist")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("multikrum", "multi-krum"),
        ("MULTI_KRUM", "multi-krum"),
        ("local-epochs", "local_epochs"),
        ("fashionmnist", "fashion-mnist"),
        ("zeno", None),
        ("", None),
    ],
)
def test_the_known_name_that_is_most_like_it(name: str, meant: str | None) -> None:
    assert did_you_mean(name, KNOWN) == ("" if meant is None else f"; did you mean {meant!r}?")


def test_all_unknown_keys_are_named_and_what_is_no_mapping_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"^unknown key 'mnits'; did you mean 'mnist'\?\nunknown key 'zeno'$"):
        check_keys("key", {"mnits": 1, "mnist": 2, "zeno": 3, 4: 5}, KNOWN)
    for harmless in ({}, {"mnist": 1, 2: 3}, "mnits", 3, None):
        check_keys("key", harmless, KNOWN)


def test_the_names_are_those_of_the_tables() -> None:
    tables = {
        "attacker_fishers": ATTACKER_FISHERS,
        "attacker_trainings": ATTACKER_TRAININGS,
        "attacker_updates": ATTACKER_UPDATES,
        "attacks": ATTACKS,
        "clusterings": CLUSTERINGS,
        "datasets": DATASETS,
        "discrepancies": SCORES,
        "informed_baselines": INFORMED_BASELINES,
        "models": MODELS,
        "rules": RULES,
        "splits": PARTITIONS,
    }
    assert {kind: tuple(table) for kind, table in tables.items()} == NAMES
