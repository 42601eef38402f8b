"""Population that train together as one batched model end where each ends by itself, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fdcr_fast import UpdateStore
from fdcr_fast.sim import simulate
from fdcr_fast.sim.clients.population import Job, Population, Upload
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.execution.contract import Outcome
from fdcr_fast.sim.execution.in_process import InProcess
from fdcr_fast.sim.execution.stacked import Stacked
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.training.models import paper_cnn
from fdcr_fast.sim.training.sgd import SGD
from fdcr_fast.sim.training.stacked_model import StackedModel
from tests.support.tiny import tiny_config, write_npz

CROWD: dict[str, Any] = {
    "clients": 9, "min_samples": 5, "beta": 0.3, "malicious": (1, 5), "local_epochs": 3, "batch_size": 16, "lr": 0.1,
}  # fmt: skip


class OnlyAttackers(InProcess):
    """What is done one by one where nothing goes wrong."""

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        assert all(job.attackers for job in jobs)
        return super().run(work, jobs, store)


def collected(federation: Federation) -> dict[object, Upload]:
    start = federation.initial_params
    federation.collect(LocalWork(federation.config, federation.classifier, Stopwatch(), 1, start, None))
    return {sent.client: Upload(sent.update, sent.fisher, int(sent.num_samples)) for sent in federation.store}


@pytest.mark.parametrize(
    "fields",
    [
        {"stack": 4},
        {"stack": 100, "stragglers": 0.6, "fisher_samples": 7, "weight_decay": 0.01},
        {"stack": 4, "local_steps": 5, "batch_size": 4, "stragglers": 0.5},
        {"stack": 2, "fishers": "needed", "server": "fedavg", "momentum": 0.0},
        {"stack": 3, "model": "cnn", "min_samples": 2, "lr": 0.01},
    ],
)
def test_uploads_are_those_of_clients_by_themselves(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("fdcr_fast.sim.training.stacked_model.MOST_GRADIENTS", 100_000)  # several parts
    if "model" in fields:
        fields = {**fields, "dataset": str(write_npz(tmp_path / "images.npz", train=120))}
    config = tiny_config(**{**CROWD, **fields})
    alone, together = Federation(config.model_copy(update={"stack": 1})), Federation(config)
    assert isinstance(together.executor, Stacked)
    together.executor._one_by_one = OnlyAttackers(together.population)
    expected, found = collected(alone), collected(together)
    assert found.keys() == expected.keys()
    assert len({sent.num_samples for sent in found.values()}) > 3
    for client, sent in found.items():
        other = expected[client]
        assert sent.num_samples == other.num_samples
        assert (sent.update - other.update).norm() < 1e-4 * other.update.norm()
        if sent.fisher is None or other.fisher is None:
            assert fields["fishers"] == "needed"
        else:
            assert (sent.fisher - other.fisher).norm() < 1e-4 * other.fisher.norm()


class Failing(Population):
    """One client's work fails."""

    def perform(self, work: LocalWork, job: Job) -> Upload:
        if job.client == 2:
            raise MemoryError("too large")
        return super().perform(work, job)


def test_an_error_is_that_of_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(tiny_config(**CROWD, stack=3))
    failing = Failing(federation.data, federation.attackers)
    federation.executor = Stacked(failing, federation.build(), "cpu", 3)
    train, calls = StackedModel.train, []

    def once(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return train(*args)

    monkeypatch.setattr(StackedModel, "train", once)
    with pytest.warns(
        UserWarning, match="3 clients train one by one: together they failed: RuntimeError: out of memory"
    ):
        sent = collected(federation)
    assert sent.keys() == set(range(9)) - {2}
    assert federation.store.rejected == {2: "failed: MemoryError: too large"}
    assert len(calls) == 3


def test_a_run_ends_where_another_stack_ends() -> None:
    results = [simulate(tiny_config(**CROWD, stack=stack)) for stack in (1, 5)]
    assert (results[0].params - results[1].params).norm() < 1e-3 * results[0].params.norm()


def test_everything_goes_to_the_device() -> None:
    rows = [torch.arange(5), torch.arange(7, 20)]
    with torch.device("meta"):  # whose tensors do not mix with those of the CPU
        model = paper_cnn((1, 16, 16), 3)
        params = torch.empty(2, sum(p.numel() for p in model.parameters()))
        images, labels = torch.empty(20, 1, 16, 16), torch.empty(20, dtype=torch.int64)
    stacked = StackedModel(model)
    trained = stacked.train(params, images, labels, [own.split(4) for own in rows], SGD(4, 0.1, 0.9, 0.0))
    fishers = stacked.fishers(trained, images, labels, rows)
    assert trained.device.type == fishers.device.type == "meta"
    assert trained.shape == fishers.shape == params.shape


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="workers: clients that train as one batched model"):
        tiny_config(stack=2, workers=2)
    with pytest.raises(ValueError, match="no such device: "):
        tiny_config(device="abacus")
    elsewhere = tiny_config(device="xpu" if torch.cuda.is_available() else "cuda")
    with pytest.raises(ValueError, match="device: no such device here"):
        Federation(elsewhere)
