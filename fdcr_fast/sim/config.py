"""One immutable, validated description of a simulation: the command line, YAML files and Python share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS
from fdcr_fast.rules.fdcr.discrepancy import SCORES
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.server_options import ServerData, ServerOptions
from fdcr_fast.rules.table import RULES
from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS, OMNISCIENT_FISHERS
from fdcr_fast.sim.attacks.poison import ATTACKS, PAPER_TRIGGER, Pixels
from fdcr_fast.sim.attacks.schedule import parse_rounds
from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES, COLLUDING_UPDATES
from fdcr_fast.sim.datasets.readers import DATASETS
from fdcr_fast.sim.datasets.splits import DRAWN, PARTITIONS
from fdcr_fast.sim.names import check_keys
from fdcr_fast.sim.notation import (
    OneOf,
    absolute,
    check_dataset,
    check_malicious,
    check_participants,
    check_rounds,
    check_trigger,
    parse_auto,
    parse_malicious,
    parse_mapping,
    parse_none,
    parse_participants,
    parse_rules,
    parse_spans,
    parse_trigger,
)
from fdcr_fast.sim.seeding import derive_seed, torch_generator
from fdcr_fast.sim.servers import INFORMED_BASELINES, OWN_SETTINGS, assumed_byzantine, rule_class
from fdcr_fast.sim.training.models import MODELS
from fdcr_fast.sim.training.sgd import SGD


class SimulationConfig(BaseModel):
    """Everything a run depends on; the defaults are the paper's setting on the digits data.

    Each field is the flag of ``fdcr-fast simulate`` of the same name and a key of its YAML file.

    Raises:
        pydantic.ValidationError: (a ValueError) unknown fields, with the known ones that are most like them, or
            impossible values; naming all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: Annotated[str, AfterValidator(check_dataset)] = Field(
        default="digits",
        description=f"{', '.join(DATASETS)}, or FILE.npz with x_train y_train x_test y_test.",
    )
    data_dir: Path | None = Field(default=None, description="Folder with the data set's files; nothing is downloaded.")
    max_train_samples: PositiveInt | None = Field(default=None, description="Use at most so many training images.")
    max_test_samples: PositiveInt | None = Field(default=None, description="Use at most so many test images.")

    clients: PositiveInt = Field(default=10, description="Number of clients.")
    participants: Annotated[
        PositiveInt | float | None, BeforeValidator(parse_participants), AfterValidator(check_participants)
    ] = Field(
        default=None,
        description="Clients drawn for each round: a number (100), a share below 1 (0.1), or all, the default.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability that a drawn client sends nothing.")
    stragglers: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Probability that one gets through 0 to local_epochs - 1 epochs only, which are all equally "
        "likely; with 0 it sends nothing.",
    )
    split: Annotated[str, OneOf(*PARTITIONS)] = Field(
        default="dirichlet", description="How images are dealt to clients."
    )
    beta: PositiveFloat = Field(default=0.5, description="Dirichlet concentration; smaller is more heterogeneous.")
    min_samples: PositiveInt = Field(default=10, description="Every client gets at least so many images.")
    samples_per_client: PositiveInt | None = Field(
        default=None, description="dirichlet-mix: how many images each client draws, whatever others have drawn."
    )

    malicious: Annotated[
        float | tuple[NonNegativeInt, ...], BeforeValidator(parse_malicious), AfterValidator(check_malicious)
    ] = Field(
        default=0.3,
        description="Share of malicious clients, drawn by the seed (0.3), or client indices with a comma "
        "(0,3,7 or, for client 2 alone, 2,).",
    )
    attack_rounds: Annotated[str, BeforeValidator(parse_spans), AfterValidator(check_rounds)] = Field(
        default="all",
        description="Rounds in which they attack: all, or 5, 5-9, 5- (start late), 1-/3 (every third) with commas; "
        "in others they are benign.",
    )
    attack: Annotated[str, OneOf(*ATTACKS)] = Field(
        default="badnets", description="What the data of malicious clients say."
    )
    target: NonNegativeInt = Field(default=2, description="Class that the backdoor calls for.")
    source: NonNegativeInt = Field(default=0, description="label-flip: class that becomes the target class.")
    poison_share: float = Field(default=0.5, ge=0, le=1, description="Share of a malicious client's images poisoned.")
    trigger: Annotated[Pixels, BeforeValidator(parse_trigger), AfterValidator(check_trigger)] = Field(
        default=PAPER_TRIGGER, description="badnets, dba: the trigger's pixels: paper, or row:column,row:column,..."
    )
    trigger_value: float = Field(
        default=1.0, ge=-1, le=1, description="badnets, dba: the trigger's value; images span -1 to 1."
    )
    blend_alpha: float = Field(default=0.2, gt=0, le=1, description="blended: share of the pattern in the image.")
    attack_file: Annotated[Path, AfterValidator(absolute)] | None = Field(
        default=None,
        description="FILE.npz; edge-case: x_train and x_test; blended: pattern, one image (without a file, noise).",
    )
    attacker_training: Annotated[str, OneOf(*ATTACKER_TRAININGS)] = Field(
        default="plain", description="How malicious clients train."
    )
    attacker_alpha: float = Field(
        default=0.7, ge=0, le=1, description="constrain-l2 and -cosine: weight of the class loss, beside the anomaly's."
    )
    attacker_mask: float = Field(
        default=0.05, ge=0, lt=1, description="neurotoxin: share of coordinates, most changed last round, left alone."
    )
    attacker_norm: Annotated[PositiveFloat | None, BeforeValidator(parse_auto)] = Field(
        default=None,
        description="pgd: radius; norm-match: norm of the update; auto is the norm that clean data would give.",
    )
    attacker_update: Annotated[str, OneOf(*ATTACKER_UPDATES)] = Field(
        default="plain", description="What malicious clients send of what they trained."
    )
    attacker_factor: Annotated[PositiveFloat | None, BeforeValidator(parse_auto)] = Field(
        default=None,
        description="scale: factor, auto is clients/attackers; alie: z, auto 1.5; ipm: factor, auto 2; "
        "gaussian: standard deviation, auto 1.",
    )
    attacker_view: Literal["benign", "attackers"] = Field(
        default="benign", description="sign-flip, ipm, alie: whose updates the mean and deviation are taken of."
    )
    attacker_fisher: Annotated[str, OneOf(*ATTACKER_FISHERS)] = Field(
        default="honest",
        description="The Fisher that malicious clients upload; random is the published code's setting.",
    )
    attacker_fisher_factor: Annotated[PositiveFloat | None, BeforeValidator(parse_auto)] = Field(
        default=None,
        description="scaled: factor, auto 10; noisy-benign-mean: log-normal noise, auto 0.1; constant: value, auto 1.",
    )

    server: Annotated[str, OneOf(*RULES, *INFORMED_BASELINES)] = Field(
        default="fdcr", description="Aggregation rule; oracle is a baseline that is told who is malicious."
    )
    discrepancy: Annotated[str, OneOf(*SCORES)] = Field(
        default="mse", description="FDCR: how far from the mean update."
    )
    cluster: Annotated[Annotated[str, OneOf(*CLUSTERINGS)] | None, BeforeValidator(parse_none)] = Field(
        default="finch", description="FDCR: clustering of the discrepancies; none drops nobody."
    )
    partition: Literal["first", "last"] | NonNegativeInt = Field(
        default="first",
        description="FDCR: FINCH partition, first (finest), last (coarsest of two or more) or an index.",
    )
    rescale: bool = Field(default=True, description="FDCR: rescale the kept updates by their importance.")
    importance: bool = Field(default=True, description="FDCR: weight the discrepancy by importance.")
    norm_bound: Annotated[PositiveFloat | None, BeforeValidator(parse_none)] = Field(
        default=100.0,
        description="FDCR: reject updates beyond so many times the median norm; none is the bare paper rule.",
    )
    gate: bool = Field(
        default=False, description="coalition-fdcr, bold start: drop nobody where no coalition stands out."
    )

    server_options: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(
        default={},
        description="Options of the rule by the names that its class gives them, such as {eps: 0.3, min_samples: 3}; "
        "they go before the other settings.",
    )

    watch: Annotated[dict[str, dict[str, Any]], BeforeValidator(parse_rules)] = Field(
        default={},
        description="Rules that look on without deciding anything, with their options, such as fdcr or "
        "{coalition-fdcr: {decay: 1.0}}: scores.csv and ranks.csv tell how they judge the attackers.",
    )

    num_byzantine: NonNegativeInt | None = Field(
        default=None,
        description="Clients assumed to be Byzantine by trimmed-mean, krum, multi-krum, bulyan, dnc and rlr; by "
        "default 30 %, or as many as the rule can stand.",
    )
    server_samples: NonNegativeInt = Field(
        default=0,
        description="Training images that the server keeps and no client gets; for fltrust, finetuning and sageflow.",
    )

    rounds: PositiveInt = Field(default=50, description="Communication rounds.")
    model: Annotated[str, OneOf(*MODELS)] = Field(
        default="auto", description="auto is the paper's cnn for images of 16 pixels or more, else mlp."
    )
    local_epochs: PositiveInt = Field(default=10, description="Epochs of local training per round.")
    batch_size: PositiveInt = Field(default=64, description="Batch size of local training.")
    lr: PositiveFloat = Field(default=0.01, description="Learning rate of local SGD.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of local SGD.")
    weight_decay: float = Field(default=1e-5, ge=0, description="Weight decay of local SGD.")
    fishers: Literal["always", "needed"] = Field(
        default="always",
        description="When clients compute a Fisher: always, or where the server reads it, which saves time.",
    )
    fisher_samples: PositiveInt | None = Field(
        default=None,
        description="Fisher of at most so many of a client's images, drawn anew in each round, instead of all: faster "
        "and not exact.",
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of every random draw.")
    workers: PositiveInt = Field(
        default=1, description="Processes that train clients side by side; results do not depend on it."
    )
    threads: PositiveInt = Field(default=1, description="Threads per operator; 1 suits small models best.")
    device: str = Field(
        default="cpu", description="Where benign clients train, such as cuda; all else is done on the CPU."
    )
    stack: PositiveInt = Field(
        default=1,
        description="Benign clients that train at a time as one batched model, which a GPU needs to be busy; the "
        "rounding of results depends on it.",
    )

    def __hash__(self) -> int:
        names = {name: frozenset(getattr(self, name)) for name in ("server_options", "watch")}  # values have no hash
        return hash(tuple({**dict(self), **names}.values()))

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, fields: Any) -> Any:
        check_keys("setting", fields, cls.model_fields)
        return fields

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
        if all(span.start > self.rounds for span in parse_rounds(self.attack_rounds)):
            raise ValueError(f"attack_rounds: {self.attack_rounds} holds none of the rounds 1..{self.rounds}")
        return self

    def attacks(self) -> bool:
        """Whether malicious clients differ from benign ones in anything: their data, training, update or Fisher."""
        return (self.attack != "none" and self.poison_share > 0) or bool(self._deviations())

    def observes_benign(self) -> bool:
        """Whether attackers look at what benign clients upload in the same round."""
        colluding = self.attacker_update in COLLUDING_UPDATES and self.attacker_view == "benign"
        return colluding or self.attacker_fisher in OMNISCIENT_FISHERS

    @model_validator(mode="after")
    def _check_server(self) -> SimulationConfig:
        self._check_rule("server", self.server, self.server_options)
        check_keys("rule to watch", self.watch, RULES)
        for name, options in self.watch.items():
            self._check_rule("watch", name, options)
        return self

    def _check_rule(self, setting: str, name: str, options: Mapping[str, Any]) -> None:
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

    def rule(self, groups: ParamGroups | None = None, data: ServerData | None = None) -> AggregationRule:
        """The server's rule, unless it is one that is told who is malicious.

        Args:
            groups: Parameters of the model's head and features.
            data: The server's own data.

        Raises:
            TypeError: an option is of a type that it cannot have.
            ValueError: an option has a value that it cannot have, or the rule needs data of the server.
        """
        return self._rule(self.server, self.server_options, groups, data)

    def watched(self, groups: ParamGroups | None = None, data: ServerData | None = None) -> dict[str, AggregationRule]:
        """The rules that look on, by name, as servers of the same settings would have them; see :meth:`rule`."""
        return {name: self._rule(name, options, groups, data) for name, options in self.watch.items()}

    def _rule(
        self, name: str, options: Mapping[str, Any], groups: ParamGroups | None, data: ServerData | None
    ) -> AggregationRule:
        known = ServerOptions(
            learning_rate=self.lr,
            groups=groups,
            num_byzantine=assumed_byzantine(name, self.cohort(), self.num_byzantine),
            noise_seed=derive_seed(self.seed, "server noise"),
            data=data,
        )
        own = {setting: getattr(self, setting) for setting in OWN_SETTINGS.get(name, ())}
        return RULES[name].make(known, {**own, **options})

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
    def sgd(self) -> SGD:
        """How everybody trains."""
        return SGD(self.batch_size, self.lr, self.momentum, self.weight_decay)

    def attackers(self) -> frozenset[int]:
        """The malicious clients: those listed, or ``round(share * clients)`` drawn by the seed."""
        if isinstance(self.malicious, tuple):
            return frozenset(self.malicious)
        order = torch.randperm(self.clients, generator=torch_generator(self.seed, "attackers"))
        return frozenset(order[: round(self.malicious * self.clients)].tolist())

    def to_yaml(self) -> str:
        """All fields as YAML that :meth:`from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, overrides: Mapping[str, Any] | None = None) -> SimulationConfig:
        """Read fields from YAML; ``overrides`` win.

        Raises:
            ValueError: not a YAML mapping, or invalid fields.
        """
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"not valid YAML: {error}") from error
        if not isinstance(fields, dict | None):
            raise ValueError(f"expected a mapping of settings, got {type(fields).__name__}")
        return cls.model_validate({**(fields or {}), **(overrides or {})})
