"""Modules are still found by the names that they had until 0.2.0."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from fdcr_fast import FedAvg, Selection, _moved


@pytest.mark.parametrize("old", sorted(_moved._PLACES))
def test_an_old_name_gives_what_is_at_the_new_places(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"fdcr_fast.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"fdcr_fast\.{old} is now fdcr_fast\."):
        module = import_module(f"fdcr_fast.{old}")
    for place in _moved._places(f"fdcr_fast.{old}"):
        there = import_module(place)
        for name in [name for name in vars(there) if not name.startswith("__")]:
            assert hasattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = module.nowhere


def test_the_ways_in_which_old_names_are_imported() -> None:
    code = """if True:
        import warnings
        warnings.simplefilter("ignore")
        from fdcr_fast.server.cluster import finch
        from fdcr_fast.server import passes
        from fdcr_fast.server.defenses import Krum, FoolsGoldState, ModelQuality
        from fdcr_fast.importance.rules import rule
        import fdcr_fast.server.store as store, fdcr_fast.sim.partition
        from fdcr_fast import FDCR, Krum as there, UpdateStore
        import fdcr_fast.server.fdcr
        assert fdcr_fast.server.fdcr.FDCR is FDCR and there is Krum and store.UpdateStore is UpdateStore
        assert finch.__module__ == "fdcr_fast.rules.fdcr.clustering" and passes.scores
        assert fdcr_fast.sim.partition.DEALT and rule
        try:
            import fdcr_fast.server.nowhere
        except ModuleNotFoundError:
            pass
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_warning_shows_the_line_that_imports() -> None:
    code = "import fdcr_fast.server.cluster"
    result = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert "<string>:1: DeprecationWarning: fdcr_fast.server.cluster is now" in result.stderr


def test_scores_by_their_former_name() -> None:
    scores = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)
    assert Selection(torch.tensor([True, False, True]), scores).discrepancy is scores
    result = FedAvg().aggregate(torch.zeros(4), torch.ones(3, 4), None, [1, 2, 3])
    assert result.discrepancy is result.scores
