"""Population in worker processes: the same bits, whatever the number of workers, and what becomes of failures."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from fdcr_fast.sim import ProgressEvent, simulate
from fdcr_fast.sim.clients.population import Job, Population, Upload
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.execution.forkserver import forkserver_context, malloc_in_huge_pages
from fdcr_fast.sim.execution.worker_pool import WorkerPool
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.run.simulation import num_threads
from tests.support.tiny import tiny_config, without_costs

CROWD: dict[str, Any] = {"clients": 12, "min_samples": 5, "malicious": (1, 5, 8), "participants": 8, "lr": 0.1}
ATTACKS: list[dict[str, Any]] = [
    {"attacker_training": "neurotoxin", "attacker_fisher": "random", "rounds": 3, "stragglers": 0.3, "local_epochs": 2},
    {"attacker_update": "alie", "attacker_view": "attackers", "attacker_fisher": "noisy-benign-mean"},
    {"local_steps": 3, "batch_size": 4, "fisher_samples": 5, "stragglers": 0.5, "malicious": (1,)},
    {"split": "dirichlet-mix", "samples_per_client": 9, "min_samples": 10, "attack": "dba", "server": "foolsgold"},
]


@pytest.mark.parametrize("fields", ATTACKS)
def test_any_number_of_workers_gives_the_same_bits(fields: dict[str, Any]) -> None:
    expected, *others = (simulate(tiny_config(**{**CROWD, **fields}, workers=workers)) for workers in (1, 2, 3))
    for other in others:
        assert torch.equal(other.params, expected.params)
        assert torch.equal(other.similarity.nan_to_num(9), expected.similarity.nan_to_num(9))
        assert other.clients == expected.clients
        assert without_costs(other) == without_costs(expected)


class Hostile(Population):
    """Population that fail in every way there is."""

    def perform(self, work: LocalWork, job: Job) -> Upload:
        if job.client == 2:
            raise MemoryError("too large")
        if job.client == 4:
            os._exit(7)
        if job.client == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        update, fisher, num_samples = super().perform(work, job)
        return Upload(update * torch.inf if job.client == 7 else update, fisher, num_samples)


def collected(federation: Federation, progress: Any = None) -> dict[object, torch.Tensor]:
    start = federation.initial_params
    with num_threads(federation.config.threads):
        federation.collect(LocalWork(federation.config, federation.classifier, Stopwatch(), 1, start, None), progress)
    return {sent.client: sent.update for sent in federation.store}


def test_workers_that_die_take_one_client_with_them_and_are_replaced() -> None:
    expected = collected(Federation(tiny_config(**CROWD | {"participants": "all"})))
    federation = Federation(tiny_config(**CROWD | {"participants": "all"}, workers=2))
    population, build = federation.population, federation.build
    federation.executor = WorkerPool(
        federation.config, Hostile(population.data, population.attackers), build, federation.store
    )
    try:
        for _ in range(2):
            sent = collected(federation)
            assert set(sent) == set(range(12)) - {2, 4, 6, 7}
            assert all(torch.equal(sent[client], expected[client]) for client in sent)
            reasons = federation.store.rejected
            assert reasons[2] == "failed: MemoryError: too large"
            assert reasons[4] == "failed: its worker process ended with exit code 7 (killed? out of memory?)"
            assert "exit code -9" in reasons[6]
            assert "not finite" in reasons[7]
    finally:
        federation.close()


def test_a_round_that_was_interrupted_leaves_nothing_behind() -> None:
    federation = Federation(tiny_config(workers=2))

    def interrupt(_: ProgressEvent) -> None:
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            collected(federation, interrupt)
        assert set(collected(federation)) == {0, 1, 2, 3}
    finally:
        federation.close()


def tell_tunables(connection: Connection) -> None:
    connection.send(os.environ.get("GLIBC_TUNABLES"))


def test_workers_keep_memory_in_huge_pages_and_heed_the_users_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    context = forkserver_context()
    here, there = context.Pipe()
    process = context.Process(target=tell_tunables, args=(there,))
    process.start()
    assert here.recv().startswith("glibc.malloc.hugetlb=1:")
    process.join()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    forkserver_context()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0", "what the server inherits is not left to others"
    with malloc_in_huge_pages():
        assert os.environ["GLIBC_TUNABLES"].split(":")[-1] == "glibc.malloc.hugetlb=0", "of two values the last counts"
