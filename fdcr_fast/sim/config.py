"""One immutable, validated description of a simulation: the command line, YAML files and Python share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import field_validator, model_validator

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.server_options import ServerData, ServerOptions
from fdcr_fast.rules.table import RULES, NamedRule
from fdcr_fast.sim.attacks.fishers import OMNISCIENT_FISHERS
from fdcr_fast.sim.attacks.schedule import attacks_in, parse_rounds
from fdcr_fast.sim.attacks.updates import COLLUDING_UPDATES
from fdcr_fast.sim.datasets.splits import DRAWN
from fdcr_fast.sim.imports import is_users
from fdcr_fast.sim.names import check_keys
from fdcr_fast.sim.seeding import derive_seed, torch_generator
from fdcr_fast.sim.servers import OWN_SETTINGS, assumed_byzantine, row_of, rule_class
from fdcr_fast.sim.settings import Settings
from fdcr_fast.sim.training.sgd import SGD


class SimulationConfig(Settings):
    """Everything a run depends on; the defaults are the paper's setting on the digits data.

    Each field is the flag of ``fdcr-fast simulate`` of the same name and a key of its YAML file.

    Raises:
        pydantic.ValidationError: (a ValueError) unknown fields, with the known ones that are most like them, or
            impossible values; naming all of them.
    """

    def __hash__(self) -> int:
        values = (
            frozenset(value) if isinstance(value, dict) else value for _, value in self
        )  # whose values have no hash
        return hash(tuple(values))

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        try:
            torch.device(value)  # may be that of another machine, whose results are read here
        except RuntimeError as error:
            raise ValueError(f"no such device: {str(error).partition(chr(10))[0]}") from None
        return value

    @model_validator(mode="after")
    def _check_clients(self) -> SimulationConfig:
        listed = self.malicious if isinstance(self.malicious, tuple) else ()
        unknown = [index for index in listed if index >= self.clients]
        if unknown:
            raise ValueError(f"malicious: no clients {unknown}, the clients are 0..{self.clients - 1}")
        if (self.split in DRAWN) != (self.samples_per_client is not None):
            raise ValueError(f"samples_per_client: goes with the splits {', '.join(DRAWN)} and no other")
        if self.stacked and self.with_workers:
            raise ValueError("workers: clients that train as one batched model do so in one process")
        if not 1 <= self.cohort() <= self.clients:
            raise ValueError(f"participants: {self.participants} of {self.clients} clients are {self.cohort()} clients")
        return self

    def _deviations(self) -> list[str]:
        """The ways other than their data in which malicious clients are to differ from benign ones."""
        plain = {"attacker_training": "plain", "attacker_update": "plain", "attacker_fisher": "honest"}
        return [f"{name} {getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]

    @model_validator(mode="after")
    def _check_attack(self) -> SimulationConfig:
        chosen = self._deviations()
        if chosen and not self.attackers():
            raise ValueError(f"malicious: {', '.join(chosen)} needs at least one malicious client, there is none")
        if self.observes_benign() and len(self.attackers()) == self.clients:
            raise ValueError(
                f"malicious: {', '.join(chosen)} needs a benign client to observe, all {self.clients} are malicious"
            )
        rounds = range(self.warmup_rounds + 1, self.rounds + 1)
        if not any(attacks_in(parse_rounds(self.attack_rounds), round) for round in rounds):
            raise ValueError(
                f"attack_rounds: {self.attack_rounds} holds none of the rounds {rounds.start}..{self.rounds}"
            )
        return self

    def attacks(self) -> bool:
        """Whether malicious clients differ from benign ones in anything: their data, training, update or Fisher."""
        poisons = self.attack != "none" and self.poison_share > 0
        return poisons or is_users("attacks", self.attack) or bool(self._deviations())

    def observes_benign(self) -> bool:
        """Whether attackers look at what benign clients upload in the same round."""
        colluding = self.attacker_update in COLLUDING_UPDATES and self.attacker_view == "benign"
        return colluding or self.attacker_fisher in OMNISCIENT_FISHERS

    @model_validator(mode="after")
    def _check_server(self) -> SimulationConfig:
        self._check_rule("server", self.server, self.server_options)
        check_keys("rule to watch", {name: None for name in self.watch if not is_users("rules", name)}, RULES)
        for name, options in self.watch.items():
            self._check_rule("watch", name, options)
        return self

    def _check_rule(self, setting: str, name: str, options: Mapping[str, Any]) -> None:
        if is_users("rules", name):  # it is imported when the run begins
            return
        needs_data = rule_class(name).needs_server_data
        if needs_data and not self.server_samples:
            raise ValueError(f"{setting}: {name} needs data of the server: set server_samples")
        assumed_byzantine(name, self.cohort(), self.num_byzantine)
        uninformed = name in RULES
        check_keys(f"option of {name}", options, RULES[name].option_names if uninformed else ())
        if uninformed and not needs_data:
            try:
                self._rule(name, options, None, None)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{setting}: {error}") from error

    def rule(
        self, groups: ParamGroups | None = None, data: ServerData | None = None, row: NamedRule | None = None
    ) -> AggregationRule:
        """The server's rule, unless it is one that is told who is malicious.

        Args:
            groups: Parameters of the model's head and features.
            data: The server's own data.
            row: A rule of the user's; None for that of the name.

        Raises:
            TypeError: an option is of a type that it cannot have.
            ValueError: an option has a value that it cannot have, or the rule needs data of the server.
        """
        return self._rule(self.server, self.server_options, groups, data, row)

    def watched(self, groups: ParamGroups | None = None, data: ServerData | None = None) -> dict[str, AggregationRule]:
        """The rules that look on, by name, as servers of the same settings would have them; see :meth:`rule`."""
        return {name: self._rule(name, options, groups, data) for name, options in self.watch.items()}

    def _rule(
        self,
        name: str,
        options: Mapping[str, Any],
        groups: ParamGroups | None,
        data: ServerData | None,
        row: NamedRule | None = None,
    ) -> AggregationRule:
        row = row_of(name) if row is None else row
        known = ServerOptions(
            learning_rate=self.lr,
            groups=groups,
            num_byzantine=assumed_byzantine(name, self.cohort(), self.num_byzantine, row.rule_class),
            noise_seed=derive_seed(self.seed, "server noise"),
            data=data,
        )
        own = {setting: getattr(self, setting) for setting in OWN_SETTINGS.get(name, ())}
        return row.make(known, {**own, **options})

    @property
    def with_workers(self) -> bool:
        """Whether clients train in worker processes, which share data and stores."""
        return self.workers > 1

    @property
    def stacked(self) -> bool:
        """Whether benign clients train as one batched model."""
        return self.stack > 1 or torch.device(self.device).type != "cpu"

    def cohort(self) -> int:
        """How many clients are drawn for a round."""
        if self.participants is None:
            return self.clients
        if isinstance(self.participants, float):
            return round(self.participants * self.clients)
        return self.participants

    @property
    def local_passes(self) -> int:
        """How far a client gets in a round that is not slow: its epochs, or its steps where those are given."""
        return self.local_epochs if self.local_steps is None else self.local_steps

    @property
    def sgd(self) -> SGD:
        """How everybody trains."""
        return SGD(self.batch_size, self.lr, self.momentum, self.weight_decay)

    def attackers(self) -> frozenset[int]:
        """The malicious clients: those listed, or ``round(share * clients)`` drawn by the seed."""
        if isinstance(self.malicious, tuple):
            return frozenset(self.malicious)
        order = torch.randperm(self.clients, generator=torch_generator(self.seed, "attackers"))
        return frozenset(order[: round(self.malicious * self.clients)].tolist())
