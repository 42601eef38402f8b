"""The federation: clients train, upload update and Fisher, the server aggregates, the result is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fdcr_fast import ParamGroups, ParamShard, UpdateStore
from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationResult, AggregationRule
from fdcr_fast.server.tiles import WHOLE, Shard
from fdcr_fast.sim.across_ranks import AcrossRanks, on_first_rank
from fdcr_fast.sim.attackers import Attackers
from fdcr_fast.sim.checkpoint import RunFolder, RunState, write_atomically
from fdcr_fast.sim.clients import ClientShares, LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.data import load_dataset
from fdcr_fast.sim.evaluation import Evaluation, Evaluator
from fdcr_fast.sim.execution import Clients, Executor, InProcess, Job
from fdcr_fast.sim.metrics import (
    ClientRecord,
    RoundRecord,
    Stopwatch,
    Summary,
    WallClock,
    importance_similarity,
    peak_rss_bytes,
    share,
    summarize,
)
from fdcr_fast.sim.participation import Participants, draw_participants
from fdcr_fast.sim.seeding import derive_seed
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.servers import INFORMED_BASELINES, SERVERS, ServerOptions, assumed_byzantine
from fdcr_fast.sim.stacked import Stacked
from fdcr_fast.sim.task import Task
from fdcr_fast.sim.training import Worker
from fdcr_fast.sim.workers import WorkerPool

_AT_A_TIME = 4  # clients that a rank trains before ranks send each other their parameters
MOST_COMPARED = 200  # clients whose similarity is kept, which takes time and memory for all pairs


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
        clients: One record per round and client drawn for it.
        similarity: Cosine similarity of the importances of the last round's clients, in the order of their records and
            at most ``MOST_COMPARED`` of them, float64 ``[S, S]``; None where they compute no Fishers.
        summary: Means over the last five rounds.
    """

    config: SimulationConfig
    params: Tensor
    rounds: tuple[RoundRecord, ...]
    clients: tuple[ClientRecord, ...]
    similarity: Tensor | None
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
        "num_byzantine": assumed_byzantine(config.server, config.cohort(), config.num_byzantine),
        "noise_seed": derive_seed(config.seed, "server noise"),
    }
    configured = {field.name for field in fields(ServerOptions)} - set(made)
    options = ServerOptions(**made, **{name: getattr(config, name) for name in configured})
    return SERVERS[config.server](options)


class Federation:
    """Everything that stays the same over the rounds; building it checks the configuration against the data.

    Args:
        config: What to run.
        group: Processes that run it together; None for this one alone.

    Attributes:
        clock: Read at the end of every round.
        similarity: Of the importances of the last round's clients, see :class:`SimulationResult`; None before it.

    Raises:
        FileNotFoundError: the data set's files are not there.
        ValueError: the configuration does not fit the data (attack, model, partition), or the server cannot run in
            several processes.
    """

    def __init__(self, config: SimulationConfig, group: ProcessGroup | None = None) -> None:
        self.clock = WallClock()
        self.config = config
        task = Task.of(config, load_dataset(config.dataset, config.data_dir))
        images = task.dataset.train_images.contiguous(memory_format=torch.channels_last)
        self.data = ClientShares(images, task.dataset.train_labels, task.partition, shared=config.workers > 1)
        self.attackers = Attackers(config, task.poisoning, self.data)
        test_images, test_labels = task.dataset.test_images, task.dataset.test_labels
        victims = task.poisoning.victims(test_images, test_labels)
        self.evaluate = Evaluator(test_images, test_labels, victims, config.target)
        self.build = task.build
        self.worker = Worker(self.build())
        data = None
        if config.server_samples:
            seed = derive_seed(config.seed, "server data")
            data = ServerData(self.worker, task.server_images, task.server_labels, config.training(), seed)
        self.rule = build_rule(config, self.attackers.clients, ParamGroups.from_module(self.worker.model), data)
        self.initial_params = self.worker.params()
        self.similarity: Tensor | None = None
        num_params, several = len(self.initial_params), config.workers > 1
        self.ranks = None if group is None else ParamShard(num_params, group)
        fishers = config.fishers == "always" or self.rule.needs_fishers
        if self.ranks is None:
            self.store = whole = UpdateStore(num_params, config.cohort(), with_fishers=fishers, shared=several)
        elif self.rule.sharded:
            self.store = UpdateStore(len(self.ranks), config.cohort(), with_fishers=fishers)
            at_a_time = max(_AT_A_TIME * config.workers, config.stack)
            whole = UpdateStore(num_params, at_a_time, with_fishers=fishers, shared=several)
        else:
            raise ValueError(f"server {config.server} needs all parameters in one process: it runs on no ranks")
        self.clients = Clients(self.data, self.attackers, fishers)
        self.executor: Executor = InProcess(self.clients)
        if several:
            self.executor = WorkerPool(config, self.clients, self.build, whole)
        elif config.stacked:
            self.executor = Stacked(self.clients, self.build(), config.device, config.stack)
        if self.ranks is not None:
            self.executor = AcrossRanks(self.ranks, self.executor, whole)

    @property
    def shard(self) -> Shard:
        """The parameters that the store has."""
        return WHOLE if self.ranks is None else self.ranks

    def uploads(self) -> ClientUpdates:
        """What the store holds, as all ranks agree on it."""
        if self.ranks is None:
            return self.store.client_updates()
        return self.ranks.agreed(self.store.client_updates, stored=True)

    def close(self) -> None:
        """End what runs besides this process."""
        self.executor.close()

    def collect(self, work: LocalWork, progress: Progress | None = None) -> Participants:
        """Let the round's clients train and fill the store with their uploads; tells who sent something and who not.

        Rows are in the order of the clients, those of attackers who wait to see what the others send come last.
        """
        self.store.clear()
        drawn = draw_participants(self.config, work.round)
        active = self.attackers.active(work.round, drawn.clients)
        order = sorted(drawn.epochs, key=lambda client: (self.attackers.wait and client in active, client))
        jobs = [
            Job(row, client, drawn.epochs[client], len(active) if client in active else 0)
            for row, client in enumerate(order)
        ]
        failed = {}
        for done, outcome in enumerate(self.executor.run(work, jobs, self.store), 1):
            if outcome.error is not None:
                failed[outcome.job.client] = outcome.error
            if progress is not None:
                progress(ProgressEvent(work.round, done))
        if self.attackers.wait:
            self.attackers.revise(work.round, active, self.store, self.shard)
        drawn = drawn.without(failed)
        for client, reason in drawn.missing.items():
            self.store.reject(client, reason)
        return drawn

    def run_round(
        self, round: int, params: Tensor, progress: Progress | None, last_update: Tensor | None = None
    ) -> tuple[Tensor, RoundRecord, list[ClientRecord]]:
        """One communication round from global parameters ``[P]`` to the next ones, with what was measured.

        ``last_update`` is what the round before changed in the parameters.
        """
        clock = Stopwatch()
        drawn = self.collect(LocalWork(self.config, self.worker, clock, round, params, last_update), progress)
        with clock.phase("aggregation"):
            result = self.rule.aggregate(self.shard.own(params), self.store, on_empty="keep", shard=self.ranks)
            new = self.shard.gather(result.params)
        with clock.phase("evaluation"):
            evaluation = on_first_rank(self.ranks, partial(self.evaluate, self.worker, new))
        clients = self._client_records(round, drawn, result)
        if round == self.config.rounds and self.store.with_fishers:
            compared = [record.client for record in clients[:MOST_COMPARED]]
            self.similarity = importance_similarity(self.uploads(), compared)
        return new, self._round_record(round, evaluation, clients, clock), clients

    def _client_records(self, round: int, drawn: Participants, result: AggregationResult) -> list[ClientRecord]:
        position = {client: index for index, client in enumerate(result.clients)}
        kept, weights, scores = result.kept.tolist(), result.weights.tolist(), result.discrepancy.tolist()
        records = []
        for client in drawn.clients:
            index = position.get(client)
            score = None if index is None else scores[index]
            records.append(
                ClientRecord(
                    round=round,
                    client=client,
                    malicious=client in self.attackers.clients,
                    num_samples=self.data.num_samples(client),
                    sent=client in drawn.epochs,
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
        evaluation: Evaluation,
        clients: list[ClientRecord],
        clock: Stopwatch,
    ) -> RoundRecord:
        sent = [record for record in clients if record.sent]
        excluded = [record.client for record in sent if not record.kept]
        attackers = self.attackers.active(round, [record.client for record in sent])
        benign = [record.client for record in sent if not record.malicious] if attackers else []
        rejected = sum(bool(record.reason) for record in sent)
        accuracy, success = evaluation.accuracy, evaluation.attack_success_rate
        return RoundRecord(
            round=round,
            accuracy=accuracy,
            loss=evaluation.loss,
            problem="diverged" if sent and rejected == len(sent) else evaluation.problem,
            attack_success_rate=success,
            backdoor_failure_rate=None if success is None else 1 - success,
            tradeoff=None if success is None else (accuracy + 1 - success) / 2,
            true_positive_rate=share(excluded, attackers),
            false_positive_rate=share(excluded, benign),
            exclusion_rate=share(excluded, [record.client for record in sent]),
            participants=len(clients),
            missing=len(clients) - len(sent),
            kept=len(sent) - len(excluded),
            rejected=rejected,
            seconds=self.clock.lap(),
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
    config: SimulationConfig,
    out: str | Path | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> SimulationResult:
    """Run a federated simulation. The same configuration gives the same bits on the same machine.

    Args:
        config: What to run.
        out: New folder for config.yaml, rounds.csv, clients.csv, summary.json, figures and checkpoint.
        progress: Called after every client and every round.
        group: Processes that all call this and run it together, the first of which measures and writes; None for this
            one alone. docs/distributed.md tells which bits do not depend on how many they are.

    Raises:
        FileNotFoundError: the data set's files are not there.
        FileExistsError: ``out`` already holds a run.
        ValueError: the configuration does not fit the data, or the server cannot run in several processes.
        RuntimeError: another process of the group died or did not arrive in time.
    """
    with _num_threads(config.threads), closing(Federation(config, group)) as federation:
        folder = None if out is None else RunFolder(Path(out))
        if folder is not None:
            on_first_rank(federation.ranks, partial(folder.create, config))
        return _run(federation, RunState(federation.initial_params, [], []), folder, progress)


def resume(out: str | Path, progress: Progress | None = None, group: ProcessGroup | None = None) -> SimulationResult:
    """Continue the run in ``out`` as its config.yaml says, to the result of an uninterrupted run.

    All processes of a group must see the folder; see :func:`simulate`.

    Raises:
        FileNotFoundError: the folder holds no run, or the data set's files are not there.
        ValueError: the folder's files do not fit together.
    """
    folder = RunFolder(Path(out))
    config = folder.config()
    with _num_threads(config.threads), closing(Federation(config, group)) as federation:
        state = folder.load() or RunState(federation.initial_params, [], [])
        if state.memory:
            federation.rule = federation.rule.with_memory(state.memory)
        return _run(federation, state, folder, progress)


def _run(
    federation: Federation, state: RunState, folder: RunFolder | None, progress: Progress | None
) -> SimulationResult:
    config = federation.config
    if federation.ranks is not None and federation.ranks.rank > 0:
        folder = progress = None
    for round in range(len(state.rounds) + 1, config.rounds + 1):
        before = state.params
        state.params, record, clients = federation.run_round(round, before, progress, state.last_update)
        state.last_update = state.params - before
        state.rounds.append(record)
        state.clients.extend(clients)
        state.memory = federation.rule.memory()
        state.similarity = federation.similarity
        if folder is not None:
            folder.save(state, clients)
        if progress is not None:
            progress(ProgressEvent(round, config.cohort(), record))
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

        write_figures(result, folder.path)
    seconds = result.summary.seconds + federation.clock.lap()
    result = replace(result, summary=result.summary.model_copy(update={"seconds": seconds}))
    if folder is not None:
        write_atomically(folder.path / "summary.json", result.summary.model_dump_json(indent=2).encode() + b"\n")
    return result
