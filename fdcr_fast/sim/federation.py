"""The federation: clients train, upload update and Fisher, the server aggregates, the result is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdcr_fast import ParamGroups, UpdateStore
from fdcr_fast.server.rules import AggregationResult, AggregationRule
from fdcr_fast.sim.attacks import ATTACKER_FISHERS, ATTACKS
from fdcr_fast.sim.checkpoint import RunFolder, RunState, write_atomically
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.data import load_dataset
from fdcr_fast.sim.metrics import (
    ClientRecord,
    RoundRecord,
    Stopwatch,
    Summary,
    importance_similarity,
    match_rate,
    peak_rss_bytes,
    share,
    summarize,
)
from fdcr_fast.sim.models import build_model
from fdcr_fast.sim.partition import PartitionOptions, partition
from fdcr_fast.sim.seeding import derive_seed, torch_generator
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.servers import INFORMED_BASELINES, SERVERS, ServerOptions, assumed_byzantine
from fdcr_fast.sim.training import Worker


@dataclass(frozen=True)
class ProgressEvent:
    """Sent after every client (``record`` is None) and after every round.

    Attributes:
        round: Under way or just finished, counted from 1.
        clients_done: Of this round.
        record: The finished round's figures.
    """

    round: int
    clients_done: int
    record: RoundRecord | None = None


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class SimulationResult:
    """Outcome of a run.

    Attributes:
        config: What was run.
        params: Final global parameters, float32 ``[P]``.
        rounds: One record per round.
        clients: One record per round and client.
        similarity: Cosine similarity of the clients' importances in the last round, float64 ``[K, K]``.
        summary: Means over the last five rounds.
    """

    config: SimulationConfig
    params: Tensor
    rounds: tuple[RoundRecord, ...]
    clients: tuple[ClientRecord, ...]
    similarity: Tensor
    summary: Summary


def build_rule(
    config: SimulationConfig, attackers: frozenset[int], groups: ParamGroups, data: ServerData | None = None
) -> AggregationRule:
    """The configured server; only the informed baselines are handed the attackers."""
    if config.server in INFORMED_BASELINES:
        return INFORMED_BASELINES[config.server](attackers)
    made: dict[str, Any] = {
        "groups": groups,
        "data": data,
        "num_byzantine": assumed_byzantine(config.server, config.clients, config.num_byzantine),
        "noise_seed": derive_seed(config.seed, "server noise"),
    }
    configured = {field.name for field in fields(ServerOptions)} - set(made)
    options = ServerOptions(**made, **{name: getattr(config, name) for name in configured})
    return SERVERS[config.server](options)


class Federation:
    """Everything that stays the same over the rounds; building it checks the configuration against the data.

    Raises:
        FileNotFoundError: the data set's files are not there.
        ValueError: the configuration does not fit the data (target, trigger, model, partition).
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.attackers = config.attackers()
        dataset = load_dataset(config.dataset, config.data_dir)
        dataset = dataset.subset(config.max_train_samples, config.max_test_samples, config.seed)
        self.attack = ATTACKS[config.attack](config.target, config.poison_share, config.trigger, config.trigger_value)
        self.attack.check(dataset.image_shape, dataset.num_classes)
        dataset, server_images, server_labels = dataset.hold_out(config.server_samples, config.seed)
        self.rows = partition(
            config.split,
            dataset,
            PartitionOptions(config.clients, config.min_samples, config.beta, config.seed),
        )
        self.images = dataset.train_images.contiguous(memory_format=torch.channels_last)
        self.labels = dataset.train_labels
        self.test_images, self.test_labels = dataset.test_images, dataset.test_labels
        # Every image belongs to one client, so a malicious client's can be poisoned in place.
        for client in sorted(self.attackers):
            rows = self.rows[client]
            self.images[rows], self.labels[rows] = self.attack.poison(
                self.images[rows], self.labels[rows], torch_generator(config.seed, "poison", client)
            )
        self.worker = Worker(build_model(config.model, dataset.image_shape, dataset.num_classes, config.seed))
        data = None
        if config.server_samples:
            seed = derive_seed(config.seed, "server data")
            data = ServerData(self.worker, server_images, server_labels, self.training, seed)
        self.rule = build_rule(config, self.attackers, ParamGroups.from_module(self.worker.model), data)
        self.initial_params = self.worker.params()
        self.store = UpdateStore(self.worker.layout.numel, config.clients)

    @property
    def training(self) -> dict[str, Any]:
        """Options of :meth:`Worker.train`, for everybody who trains."""
        config = self.config
        return {
            "epochs": config.local_epochs,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
        }

    def train_client(self, round: int, client: int, params: Tensor, clock: Stopwatch) -> None:
        """Train one client from the global parameters and upload update and Fisher to the store."""
        config, rows = self.config, self.rows[client]
        with clock.phase("training"):
            self.worker.load(params)
            self.worker.train(
                self.images,
                self.labels,
                rows,
                generator=torch_generator(config.seed, "shuffle", round, client),
                **self.training,
            )
            update = self.worker.params() - params
        with clock.phase("fisher"):
            fisher = self.worker.fisher(self.images, self.labels, rows)
            if client in self.attackers:
                craft = ATTACKER_FISHERS[config.attacker_fisher]
                fisher = craft(fisher, torch_generator(config.seed, "attacker fisher", round, client))
        with clock.phase("aggregation"):
            self.store.put(update, fisher, len(rows), client_id=client)

    def run_round(
        self, round: int, params: Tensor, progress: Progress | None
    ) -> tuple[Tensor, RoundRecord, list[ClientRecord]]:
        """One communication round from global parameters ``[P]`` to the next ones, with what was measured."""
        clock = Stopwatch()
        self.store.clear()
        for client in range(self.config.clients):
            self.train_client(round, client, params, clock)
            if progress is not None:
                progress(ProgressEvent(round, client + 1))
        with clock.phase("aggregation"):
            result = self.rule.aggregate(params, self.store)
        with clock.phase("evaluation"):
            self.worker.load(result.params)
            others = self.test_labels != self.attack.target
            accuracy = match_rate(self.worker.predict(self.test_images), self.test_labels)
            success = None
            if others.any():
                triggered = self.attack.stamp(self.test_images[others])
                success = match_rate(self.worker.predict(triggered), self.attack.target)
        clients = self._client_records(round, result)
        return result.params, self._round_record(round, accuracy, success, clients, clock), clients

    def _client_records(self, round: int, result: AggregationResult) -> list[ClientRecord]:
        position = {client: index for index, client in enumerate(result.clients)}
        kept, weights, scores = result.kept.tolist(), result.weights.tolist(), result.discrepancy.tolist()
        records = []
        for client, rows in enumerate(self.rows):
            index = position.get(client)
            score = None if index is None else scores[index]
            records.append(
                ClientRecord(
                    round=round,
                    client=client,
                    malicious=client in self.attackers,
                    num_samples=len(rows),
                    discrepancy=None if score != score else score,
                    weight=0.0 if index is None else weights[index],
                    kept=index is not None and kept[index],
                    reason=result.rejected.get(client, ""),
                )
            )
        return records

    def _round_record(
        self,
        round: int,
        accuracy: float,
        success: float | None,
        clients: list[ClientRecord],
        clock: Stopwatch,
    ) -> RoundRecord:
        excluded = [record.client for record in clients if not record.kept]
        benign = set(range(self.config.clients)) - self.attackers
        return RoundRecord(
            round=round,
            accuracy=accuracy,
            attack_success_rate=success,
            backdoor_failure_rate=None if success is None else 1 - success,
            tradeoff=None if success is None else (accuracy + 1 - success) / 2,
            true_positive_rate=share(excluded, self.attackers),
            false_positive_rate=share(excluded, benign),
            kept=len(clients) - len(excluded),
            rejected=sum(bool(record.reason) for record in clients),
            peak_rss_bytes=peak_rss_bytes(),
            **{f"{phase}_seconds": seconds for phase, seconds in clock.seconds.items()},
        )


@contextmanager
def _num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def simulate(
    config: SimulationConfig, out: str | Path | None = None, progress: Progress | None = None
) -> SimulationResult:
    """Run a federated simulation. The same configuration gives the same bits on the same machine.

    Args:
        config: What to run.
        out: New folder for config.yaml, rounds.csv, clients.csv, summary.json, figures and checkpoint.
        progress: Called after every client and every round.

    Raises:
        FileNotFoundError: the data set's files are not there.
        FileExistsError: ``out`` already holds a run.
        ValueError: the configuration does not fit the data.
    """
    with _num_threads(config.threads):
        federation = Federation(config)
        folder = None if out is None else RunFolder(Path(out))
        if folder is not None:
            folder.create(config)
        return _run(federation, RunState(federation.initial_params, [], []), folder, progress)


def resume(out: str | Path, progress: Progress | None = None) -> SimulationResult:
    """Continue the run in ``out`` as its config.yaml says, to the result of an uninterrupted run.

    Raises:
        FileNotFoundError: the folder holds no run, or the data set's files are not there.
        ValueError: the folder's files do not fit together.
    """
    folder = RunFolder(Path(out))
    config = folder.config()
    with _num_threads(config.threads):
        federation = Federation(config)
        state = folder.load() or RunState(federation.initial_params, [], [])
        if state.memory:
            federation.rule = federation.rule.with_memory(state.memory)
        return _run(federation, state, folder, progress)


def _run(
    federation: Federation, state: RunState, folder: RunFolder | None, progress: Progress | None
) -> SimulationResult:
    config = federation.config
    for round in range(len(state.rounds) + 1, config.rounds + 1):
        state.params, record, clients = federation.run_round(round, state.params, progress)
        state.rounds.append(record)
        state.clients.extend(clients)
        state.memory = federation.rule.memory()
        if round == config.rounds:
            state.similarity = importance_similarity(federation.store, config.clients)
        if folder is not None:
            folder.save(state, clients)
        if progress is not None:
            progress(ProgressEvent(round, config.clients, record))
    assert state.similarity is not None
    result = SimulationResult(
        config,
        state.params,
        tuple(state.rounds),
        tuple(state.clients),
        state.similarity,
        summarize(state.rounds),
    )
    if folder is not None:
        from fdcr_fast.sim.figures import write_figures

        write_atomically(folder.path / "summary.json", result.summary.model_dump_json(indent=2).encode() + b"\n")
        write_figures(result, folder.path)
    return result
