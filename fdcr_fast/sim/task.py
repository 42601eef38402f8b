"""What a configuration makes of a data set; making it checks that the two fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from fdcr_fast.sim.attacks.poison import ATTACKS, Poisoning, PoisonOptions
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.partition import Partition, PartitionOptions
from fdcr_fast.sim.datasets.splits import partition
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
        build: Makes the model with its initial weights.
    """

    dataset: Dataset
    server_images: Tensor
    server_labels: Tensor
    partition: Partition
    poisoning: Poisoning
    build: Callable[[], nn.Module]

    @classmethod
    def of(cls, config: SimulationConfig, dataset: Dataset) -> Task:
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
        poisoning = ATTACKS[config.attack](
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
        build = partial(build_model, config.model, dataset.image_shape, dataset.num_classes, config.seed)
        return cls(dataset, server_images, server_labels, rows, poisoning, build)
