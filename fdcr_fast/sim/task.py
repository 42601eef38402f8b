"""What a configuration makes of a data set; making it checks that the two fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fdcr_fast.sim.attacks.poison import ATTACKS, PoisonOptions
from fdcr_fast.sim.attacks.stages import DataPoison, UsersPoison
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.partition import Partition, PartitionOptions
from fdcr_fast.sim.datasets.splits import partition
from fdcr_fast.sim.parts import Parts
from fdcr_fast.sim.training.classifier import Architecture
from fdcr_fast.sim.training.models import build_model


@dataclass(frozen=True, eq=False)
class Task:
    """What clients, attackers and server work on.

    Attributes:
        dataset: The clients' images, and those that test the global model.
        server_images: Images that the server has and no client, ``[S, C, H, W]``.
        server_labels: Their labels, int64 ``[S]``.
        partition: Which of the clients' images each client has.
        poisoning: What attackers do to theirs.
        build: Makes the model with its initial weights, and what trains it.
    """

    dataset: Dataset
    server_images: Tensor
    server_labels: Tensor
    partition: Partition
    poisoning: DataPoison
    build: Architecture

    @classmethod
    def of(cls, config: SimulationConfig, dataset: Dataset, parts: Parts | None = None) -> Task:
        """The task of a run on a data set, all of it. No image is looked at: see :meth:`Dataset.without_pixels`.

        Raises:
            FileNotFoundError: the attack's file is not there.
            ValueError: attack, partition or server data do not fit the data set.
        """
        dataset = dataset.subset(config.max_train_samples, config.max_test_samples, config.seed)
        dataset, server_images, server_labels = dataset.hold_out(config.server_samples, config.seed)
        rows = partition(
            config.split,
            dataset,
            PartitionOptions(config.clients, config.min_samples, config.beta, config.seed, config.samples_per_client),
        )
        parts = Parts.of(config) if parts is None else parts
        build = partial(
            build_model,
            config.model if parts.model is None else parts.model,
            dataset.image_shape,
            dataset.num_classes,
            config.seed,
            config.model_options,
        )
        architecture = Architecture(build, parts.loss, parts.optimizer, config.precision)
        return cls(dataset, server_images, server_labels, rows, _poisoning(config, dataset, parts), architecture)

    def victims(self) -> tuple[Tensor, Tensor | int]:
        """The inputs that a successful attack makes the model take for a class, and that class, or one for each."""
        images, labels = self.dataset.attack_images, self.dataset.attack_labels
        if images is not None and labels is not None:
            return images, labels
        victims = self.poisoning.victims(self.dataset.test_images, self.dataset.test_labels)
        return victims, self.poisoning.target


def _poisoning(config: SimulationConfig, dataset: Dataset, parts: Parts) -> DataPoison:
    if parts.attack is not None:
        target = getattr(parts.attack, "target", config.target)
        if not 0 <= target < dataset.num_classes:
            raise ValueError(f"attack: its target is class {target}, the classes are 0..{dataset.num_classes - 1}")
        return UsersPoison(parts.attack, target)
    return ATTACKS[config.attack](
        PoisonOptions(
            target=config.target,
            poison_share=config.poison_share,
            source=config.source,
            trigger=config.trigger,
            trigger_value=config.trigger_value,
            blend_alpha=config.blend_alpha,
            attack_file=config.attack_file,
            attackers=len(config.attackers()),
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            seed=config.seed,
        )
    )
