from __future__ import annotations

import pytest
import torch

from fdcr_fast.rules.table import RULES
from fdcr_fast.sim import simulate
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.training.classifier import classifier_of
from fdcr_fast.sim.training.models import build_model
from tests.support.tiny import tiny_config


def test_training_and_judging() -> None:
    config = tiny_config(local_epochs=20)
    _, images, labels = load_dataset("digits").hold_out(60, seed=0)
    classifier = classifier_of(build_model("mlp", (1, 8, 8), 10, seed=0))
    data = ServerData(classifier, images, labels, config.sgd, config.local_epochs, 7)
    w = classifier.params()
    better = data.refine(w)
    before, after = data.evaluate(w), data.evaluate(better)
    assert after.loss < 0.7 * before.loss
    assert after.entropy < before.entropy <= torch.tensor(10.0).log() + 1e-6
    assert torch.equal(data.update(w), better - w), "the same parameters give the same training"
    assert not torch.equal(ServerData(**{**vars(data), "seed": 8}).refine(w), better)


@pytest.mark.parametrize("server", RULES)
def test_every_server_runs(server: str) -> None:
    result = simulate(tiny_config(server=server, server_samples=30, clients=5, rounds=1))
    assert result.params.isfinite().all()
