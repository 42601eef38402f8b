"""What a run begins with and what it saves: models in files, and rounds in which nobody attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdcr_fast.sim import simulate
from fdcr_fast.sim.run import figures
from fdcr_fast.sim.run.federation import Federation
from tests.support import users
from tests.support.tiny import tiny_config

OWN: dict[str, Any] = {"data": users.data, "model": users.Residual}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)


def test_a_saved_model_is_what_another_run_begins_with(tmp_path: Path) -> None:
    first = simulate(users.config(rounds=4, save_every=2), tmp_path / "run", **OWN)
    saved = sorted(path.name for path in (tmp_path / "run").glob("model-*"))
    assert saved == ["model-00002.safetensors", "model-00004.safetensors"]
    last = tmp_path / "run" / saved[-1]
    state = load_file(last)
    model = users.Residual(3)
    model.load_state_dict(state)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), first.params)
    begun = Federation(
        users.config(init=last, model="tests.support.users:Residual", dataset="tests.support.users:data")
    )
    assert torch.equal(begun.initial_params, first.params)
    assert torch.equal(begun.buffers, first.buffers)
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "wrapped.safetensors")
    wrapped = simulate(users.config(rounds=1, init=tmp_path / "wrapped.safetensors"), **OWN)
    assert torch.equal(wrapped.params, simulate(users.config(rounds=1, init=last), **OWN).params)
    assert not torch.equal(wrapped.params, simulate(users.config(rounds=1), **OWN).params)


def test_files_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    state = users.Residual(4).state_dict()
    state["extra"] = state.pop("stem.bias")
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"no stem\.bias; extra, which the model has not; head\.weight \[4, 4\], which i"
    ):
        simulate(users.config(init=path), **OWN)
    state = users.Residual(3).state_dict()
    state["head.weight"][0, 0] = torch.nan
    save_file(state, path)
    with pytest.raises(ValueError, match=r"init: .* has numbers that are not finite in head\.weight"):
        simulate(users.config(init=path), **OWN)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no file of safetensors"):
        simulate(users.config(init=path), **OWN)
    with pytest.raises(FileNotFoundError, match=r"init: no file .*nowhere\.safetensors"):
        simulate(users.config(init=tmp_path / "nowhere.safetensors"), **OWN)


def test_nobody_attacks_while_the_model_warms_up() -> None:
    warm = simulate(tiny_config(rounds=3, warmup_rounds=2))
    assert torch.equal(warm.params, simulate(tiny_config(rounds=3, attack_rounds="3-")).params)
    assert [record.true_positive_rate is None for record in warm.rounds] == [True, True, False]
    with pytest.raises(ValueError, match=r"attack_rounds: 1-3 holds none of the rounds 4\.\.5"):
        tiny_config(rounds=5, warmup_rounds=3, attack_rounds="1-3")
