"""The settings of a simulation: names, types, defaults, and what the command line says of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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
    model_validator,
)
from typing_extensions import Self

from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER, Pixels
from fdcr_fast.sim.imports import SHIPPED
from fdcr_fast.sim.names import NAMES, check_keys
from fdcr_fast.sim.notation import (
    OneOf,
    PartName,
    absolute,
    check_dataset,
    check_malicious,
    check_participants,
    check_rounds,
    check_trigger,
    parse_auto,
    parse_malicious,
    parse_mapping,
    parse_names,
    parse_none,
    parse_participants,
    parse_rules,
    parse_spans,
    parse_trigger,
)
from fdcr_fast.sim.training.precision import FULL, Precision


class Settings(BaseModel):
    """Each field is the flag of ``fdcr-fast simulate`` of the same name and a key of its YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: Annotated[str, AfterValidator(check_dataset)] = Field(
        default="digits",
        description=f"{', '.join([*NAMES['datasets'], *SHIPPED['datasets']])}, FILE.npz with x_train y_train x_test "
        "y_test, or package.module:name of a function that returns a FederatedData.",
    )
    dataset_options: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(
        default={}, description="Arguments of that function by name."
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
        "likely (or steps, with local_steps); with 0 it sends nothing.",
    )
    split: Annotated[str, OneOf(*NAMES["splits"])] = Field(
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
    warmup_rounds: NonNegativeInt = Field(default=0, description="First rounds, in which nobody attacks.")
    attack: Annotated[str, PartName("attacks", *NAMES["attacks"])] = Field(
        default="badnets",
        description="What the data of malicious clients say; trigger-words, of texts; or package.module:name of an "
        "attack of your own.",
    )
    attack_options: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(
        default={}, description="Arguments of an attack of your own by name."
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
    attacker_training: Annotated[str, OneOf(*NAMES["attacker_trainings"])] = Field(
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
    attacker_update: Annotated[str, OneOf(*NAMES["attacker_updates"])] = Field(
        default="plain", description="What malicious clients send of what they trained."
    )
    attacker_factor: Annotated[PositiveFloat | None, BeforeValidator(parse_auto)] = Field(
        default=None,
        description="scale: factor, auto is clients/attackers; add-model: factor of the model, auto gives the "
        "cosine of clean data; alie: z, auto 1.5; ipm: factor, auto 2; gaussian: standard deviation, auto 1.",
    )
    attacker_view: Literal["benign", "attackers"] = Field(
        default="benign", description="sign-flip, ipm, alie: whose updates the mean and deviation are taken of."
    )
    attacker_fisher: Annotated[str, OneOf(*NAMES["attacker_fishers"])] = Field(
        default="honest",
        description="The Fisher that malicious clients upload; random is the published code's setting.",
    )
    attacker_fisher_factor: Annotated[PositiveFloat | None, BeforeValidator(parse_auto)] = Field(
        default=None,
        description="scaled: factor, auto 10; noisy-benign-mean: log-normal noise, auto 0.1; constant: value, auto 1.",
    )

    server: Annotated[str, PartName("rules", *NAMES["rules"], *NAMES["informed_baselines"])] = Field(
        default="fdcr",
        description="Aggregation rule, or package.module:name of one of your own; oracle is a baseline that is told "
        "who is malicious.",
    )
    discrepancy: Annotated[str, OneOf(*NAMES["discrepancies"])] = Field(
        default="mse", description="FDCR: how far from the mean update."
    )
    cluster: Annotated[Annotated[str, OneOf(*NAMES["clusterings"])] | None, BeforeValidator(parse_none)] = Field(
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
        default=False, description="coalition-fdcr with a bold start: drop nobody where no coalition stands out."
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
    model: Annotated[str, PartName("models", *NAMES["models"])] = Field(
        default="auto",
        description="auto is the paper's cnn for images of 16 pixels or more, else mlp; lstm and transformer are for "
        "texts; or package.module:name of a function that returns an nn.Module.",
    )
    model_options: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(
        default={}, description="Arguments of that function by name."
    )
    init: Annotated[Path, AfterValidator(absolute)] | None = Field(
        default=None, description="FILE.safetensors of a model to begin with, such as a pretrained one."
    )
    save_every: PositiveInt | None = Field(
        default=None, description="Save the global model as safetensors after every so many rounds."
    )
    local_epochs: PositiveInt = Field(default=10, description="Epochs of local training per round.")
    local_steps: PositiveInt | None = Field(
        default=None,
        description="Batches of local training per round instead of epochs: of all of a client's images in random "
        "order, and again if these are not enough.",
    )
    batch_size: PositiveInt = Field(default=64, description="Batch size of local training.")
    lr: PositiveFloat = Field(default=0.01, description="Learning rate of local SGD.")
    loss: Annotated[str, PartName("losses", "cross_entropy")] = Field(
        default="cross_entropy",
        description="Loss of local training and of the Fisher: cross_entropy, or package.module:name of a function of "
        "outputs [N, classes] and labels [N] that returns the losses [N].",
    )
    optimizer: Annotated[str, PartName("optimizers", "sgd")] = Field(
        default="sgd",
        description="Optimizer of local training, new in every round: sgd, or package.module:name of a function of "
        "parameters and learning rate, such as torch.optim:Adam; momentum and weight decay are those of sgd.",
    )
    optimizer_options: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(
        default={}, description="Further arguments of that function by name."
    )
    precision: Precision = Field(
        default=FULL,
        description="What local training computes in: 32-true, or bf16-mixed, bfloat16 by autocast with weights of "
        "float32, for processors with AMX or AVX512-BF16, or a GPU; Fishers and evaluation stay in float32.",
    )
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
    callbacks: Annotated[tuple[Annotated[str, PartName("callbacks")], ...], BeforeValidator(parse_names)] = Field(
        default=(),
        description=f"What is told of every round: {', '.join(SHIPPED['callbacks'])}, or package.module:name of a "
        "Callback of your own, with commas.",
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

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, fields: Any) -> Any:
        check_keys("setting", fields, cls.model_fields)
        return fields

    def to_yaml(self) -> str:
        """All fields as YAML that :meth:`from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, overrides: Mapping[str, Any] | None = None) -> Self:
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
