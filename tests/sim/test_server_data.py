from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from fdcr_fast.sim import simulate
from fdcr_fast.sim.data import load_dataset
from fdcr_fast.sim.models import build_model
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.servers import SERVERS
from fdcr_fast.sim.training import Worker


def test_what_the_server_holds_no_client_has() -> None:
    dataset = load_dataset("digits")
    rest, images, labels = dataset.hold_out(100, seed=3)
    assert len(labels) == len(images) == 100
    assert len(rest.train_labels) == len(rest.train_images) == len(dataset.train_labels) - 100
    assert rest.writers is not None
    assert len(rest.writers) == len(rest.train_labels)
    everything = torch.cat([images, rest.train_images]).flatten(1).sort(0).values
    assert torch.equal(everything, dataset.train_images.flatten(1).sort(0).values)
    assert torch.equal(rest.test_images, dataset.test_images)
    again, other = dataset.hold_out(100, seed=3)[1], dataset.hold_out(100, seed=4)[1]
    assert torch.equal(again, images)
    assert not torch.equal(other, images)
    untouched, none, _ = dataset.hold_out(0, seed=3)
    assert torch.equal(untouched.train_images, dataset.train_images)
    assert len(none) == 0
    all_of_them = len(dataset.train_labels)
    with pytest.raises(ValueError, match=f"server_samples: {all_of_them} of {all_of_them} training images"):
        dataset.hold_out(all_of_them, seed=3)


def test_training_and_judging() -> None:
    config = tiny_config(local_epochs=20)
    _, images, labels = load_dataset("digits").hold_out(60, seed=0)
    worker = Worker(build_model("mlp", (1, 8, 8), 10, seed=0))
    data = ServerData(worker, images, labels, config.training(), 7)
    w = worker.params()
    better = data.refine(w)
    before, after = data.evaluate(w), data.evaluate(better)
    assert after.loss < 0.7 * before.loss
    assert after.entropy < before.entropy <= torch.tensor(10.0).log() + 1e-6
    assert torch.equal(data.update(w), better - w), "the same parameters give the same training"
    assert not torch.equal(ServerData(**{**vars(data), "seed": 8}).refine(w), better)


@pytest.mark.parametrize("server", SERVERS)
def test_every_server_runs(server: str) -> None:
    result = simulate(tiny_config(server=server, server_samples=30, clients=5, rounds=1))
    assert result.params.isfinite().all()
