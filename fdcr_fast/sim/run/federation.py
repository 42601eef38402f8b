"""The federation: clients train, upload update and Fisher, the server aggregates, the result is measured."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from fdcr_fast import ParamGroups
from fdcr_fast.rules import server_options
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.rules.table import NamedRule
from fdcr_fast.sim.attacks.stages import Stages
from fdcr_fast.sim.clients.attackers import Attackers
from fdcr_fast.sim.clients.buffers import RoundBuffers
from fdcr_fast.sim.clients.data import ClientData
from fdcr_fast.sim.clients.fit import check_fit
from fdcr_fast.sim.clients.participation import Participants, draw_participants
from fdcr_fast.sim.clients.population import Job, Population
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.costs import Stopwatch, WallClock
from fdcr_fast.sim.datasets.dataset import stored
from fdcr_fast.sim.execution.ranks import Alone, Processes, Ranks
from fdcr_fast.sim.parts import Parts
from fdcr_fast.sim.run.callbacks import PartError, users_code
from fdcr_fast.sim.run.evaluation import Evaluator
from fdcr_fast.sim.run.metrics import Round, round_record
from fdcr_fast.sim.run.records import ClientRecord, RoundRecord
from fdcr_fast.sim.run.result import MOST_COMPARED, Progress, ProgressEvent
from fdcr_fast.sim.run.watch import Watch
from fdcr_fast.sim.seeding import derive_seed
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.servers import INFORMED_BASELINES
from fdcr_fast.sim.similarity import importance_similarity
from fdcr_fast.sim.task import Task


def build_rule(
    config: SimulationConfig,
    attackers: frozenset[int],
    groups: ParamGroups,
    data: server_options.ServerData | None = None,
    row: NamedRule | None = None,
) -> AggregationRule:
    """The configured server; only the informed baselines are handed the attackers."""
    if config.server in INFORMED_BASELINES:
        return INFORMED_BASELINES[config.server](attackers)
    return config.rule(groups, data, row)


class Federation:
    """Everything that stays the same over the rounds; building it checks the configuration against the data.

    Args:
        config: What to run.
        group: Processes that run it together; None for this one alone.
        parts: What is the user's; None for what the configuration names.

    Attributes:
        clock: Read at the end of every round.
        similarity: Similarity of the importances of the last round's clients; None before it. See
            :class:`fdcr_fast.sim.SimulationResult`.
        watch: The rules that look on, and what they said of the last round.
        users_rule: Whether the server's rule is the user's.
        users_attack: Whether the attack is.
        buffers: Buffers of the global model, float64 ``[B]``.

    Raises:
        FileNotFoundError: the data set's files are not there.
        TypeError: a part is not what it is given or named as.
        ValueError: the configuration does not fit the data (attack, model, partition), a part cannot be imported, or
            the server cannot run in several processes.
    """

    def __init__(self, config: SimulationConfig, group: ProcessGroup | None = None, parts: Parts | None = None) -> None:
        self.clock = WallClock()
        self.config = config
        parts = Parts.of(config) if parts is None else parts
        task = Task.of(config, parts.dataset(config), parts)
        dataset = task.dataset
        images = stored(dataset.train_images)
        self.data = ClientData(images, dataset.train_labels, task.partition, shared=config.with_workers)
        stages = Stages.of(config.attacker_training, config.attacker_update, config.attacker_fisher, parts.attack)
        self.attackers = Attackers(config, task.poisoning, stages, self.data)
        self.evaluate = Evaluator(dataset.test_images, dataset.test_labels, *task.victims())
        self.build = task.build
        self.classifier = self.build.classifier()
        if config.init is not None:
            from fdcr_fast.sim.training.files import load_model  # safetensors, which few runs need

            load_model(self.classifier, config.init)
        check_fit(config, parts, self.classifier, dataset, self.attackers)
        self.initial_params, self.buffers = self.classifier.params(), self.classifier.buffers()
        groups = self.classifier.groups()
        server_data = self._server_data(task)
        self.rule = build_rule(config, self.attackers.clients, groups, server_data, parts.rule)
        self.users_rule, self.users_attack = parts.rule is not None, parts.attack is not None
        self.watch = Watch(config.watched(groups, server_data))
        rules = [(config.server, self.rule), *self.watch.rules.items()]
        self.similarity: Tensor | None = None
        num_params = len(self.initial_params)
        self.processes: Processes = Alone() if group is None else Ranks(num_params, group)
        for name, rule in rules:
            if group is not None and not rule.sharded:
                raise ValueError(f"server {name} needs all parameters in one process: it runs on no ranks")
        with_fishers = config.fishers == "always" or any(rule.needs_fishers for _, rule in rules)
        buffers = RoundBuffers(self.classifier.buffer_layout, self.classifier.buffer_dtypes, config.cohort())
        self.population = Population(self.data, self.attackers, with_fishers, buffers)
        self.store, self.executor = self.processes.start(config, self.population, self.build, num_params)

    def _server_data(self, task: Task) -> ServerData | None:
        if not self.config.server_samples:
            return None
        if len(self.buffers):
            raise ValueError("server_samples: servers with data of their own take no models with buffers")
        seed = derive_seed(self.config.seed, "server data")
        images, labels, epochs = task.server_images, task.server_labels, self.config.local_epochs
        return ServerData(self.classifier, images, labels, self.config.sgd, epochs, seed)

    def close(self) -> None:
        """End what runs besides this process."""
        self.executor.close()

    def collect(self, work: LocalWork, progress: Progress | None = None) -> Participants:
        """Let the round's clients train and fill the store with their uploads; tells who sent something and who not.

        Rows are in the order of the clients, those of attackers who wait to see what the others send come last.
        """
        self.store.clear()
        self.population.buffers.sent.copy_(self.buffers)
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
            self.attackers.revise(work.round, active, self.store, self.processes.shard)
        self._rows = {job.client: job.row for job in jobs}
        attacking = active.intersection(drawn.epochs) if self.users_attack else ()
        for kind, expected in (("clients", drawn.epochs), ("attackers", attacking)):
            if expected and failed.keys() >= set(expected):
                raise PartError(f"round {work.round}: all {len(expected)} {kind} failed: {failed[min(expected)]}")
        self._screen_buffers()
        drawn = drawn.without(failed)
        for client, reason in drawn.missing.items():
            self.store.reject(client, reason)
        return drawn

    def _screen_buffers(self) -> None:
        """Reject clients whose buffers cannot be used."""
        for client in [int(str(client)) for client in self.store.clients] if len(self.buffers) else ():
            problem = self.population.buffers.problem(self._rows[client])
            if problem is not None:
                self.store.remove(client)
                self.store.reject(client, problem)

    def run_round(
        self, number: int, params: Tensor, progress: Progress | None, last_update: Tensor | None = None
    ) -> tuple[Tensor, RoundRecord, list[ClientRecord]]:
        """One communication round from global parameters ``[P]`` to the next ones, with what was measured.

        Args:
            number: Which round, counted from 1.
            params: Global parameters as sent out, ``[P]``.
            progress: Called after every client.
            last_update: What the round before changed in the parameters.
        """
        clock = Stopwatch()
        drawn = self.collect(LocalWork(self.config, self.classifier, clock, number, params, last_update), progress)
        with clock.phase("aggregation"):
            with users_code(f"round {number}, server {self.config.server}") if self.users_rule else nullcontext():
                result = self.processes.aggregate(self.rule, params, self.store)
                new = self.processes.shard.gather(result.params)
                if self.users_rule and not (new.shape == params.shape and new.isfinite().all()):
                    raise ValueError(f"the new parameters are not {len(params)} finite numbers")
            self.buffers = self.population.buffers.combined(self.rule, result, self._rows)
        with clock.phase("evaluation"):
            evaluation = self.processes.from_first(partial(self.evaluate, self.classifier, new, self.buffers))
        clients = self._client_records(number, drawn, result)
        if number == self.config.rounds and self.store.with_fishers:
            compared = [record.client for record in clients[:MOST_COMPARED]]
            self.similarity = importance_similarity(self.processes.uploads(self.store), compared)
        attackers = self.attackers.active(number, drawn.epochs)
        self.watch.look(number, params, self.processes, self.store, attackers)
        record = round_record(number, Round(evaluation, clients, attackers), self.clock.lap(), clock.seconds)
        return new, record, clients

    def memory(self) -> bytes:
        """What the rule remembers of the rounds so far."""
        with users_code(f"server {self.config.server}") if self.users_rule else nullcontext():
            memory = self.rule.memory()
            if not isinstance(memory, bytes):
                raise TypeError(f"memory() must return bytes, it returned a {type(memory).__name__}")
            return memory

    def _client_records(self, round: int, drawn: Participants, result: AggregationResult) -> list[ClientRecord]:
        position = {client: index for index, client in enumerate(result.clients)}
        kept, weights, scores = result.kept.tolist(), result.weights.tolist(), result.scores.tolist()
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
                    explanation=_in_words(result.explanation.get(client)),
                )
            )
        return records


def _in_words(explanation: Any) -> str:
    """``similarity 0.31, distance -0.2``: the numbers that a rule gives for a client, by name."""
    if explanation is None:
        return ""
    named = explanation._asdict() if hasattr(explanation, "_asdict") else vars(explanation)
    return ", ".join(f"{name} {value:.3g}" for name, value in named.items() if isinstance(value, float))
