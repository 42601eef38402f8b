"""What the data of malicious clients say, and which test images tell whether that worked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER, Pixels
from fdcr_fast.sim.datasets.dataset import as_images
from fdcr_fast.sim.seeding import torch_generator


@dataclass(frozen=True)
class PoisonOptions:
    """What a poisoning may depend on: settings of :class:`fdcr_fast.sim.SimulationConfig`, and the data's shape.

    Attributes:
        attackers: Number of malicious clients.
        image_shape: ``(C, H, W)``.
    """

    target: int
    poison_share: float
    source: int
    trigger: Pixels
    trigger_value: float
    blend_alpha: float
    attack_file: Path | None
    attackers: int
    image_shape: tuple[int, ...]
    num_classes: int
    seed: int


@dataclass(frozen=True, eq=False)
class Poisoning(ABC):
    """Some of a malicious client's images are changed and labelled with the target class.

    Attributes:
        target: The class that the poisoned images should be taken for.
        poison_share: Share of the images that can be poisoned which are.
    """

    target: int
    poison_share: float

    def poison(
        self, images: Tensor, labels: Tensor, attacker: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A copy of a client's data, ``round(poison_share * candidates)`` of it, at random, poisoned.

        Args:
            images: Float32 ``[N, C, H, W]`` in [-1, 1].
            labels: Int64 ``[N]``.
            attacker: The client's position among the malicious clients.
            generator: Source of every random draw.
        """
        candidates = self.candidates(labels)
        count = round(self.poison_share * len(candidates))
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        images, labels = images.clone(), labels.clone()
        images[chosen] = self.poisoned(images[chosen], attacker, generator)
        labels[chosen] = self.target
        return images, labels

    def candidates(self, labels: Tensor) -> Tensor:
        """Indices of the images that can be poisoned: all of them."""
        return torch.arange(len(labels))

    @abstractmethod
    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """What the images are replaced with."""

    @abstractmethod
    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images that a successful attack makes the model take for the target class, given the test images.

        The attack success rate is the share of them for which it does; it is undefined if there are none.
        """


class Unpoisoned(Poisoning):
    """Nothing is poisoned, for attackers that only want to do harm; accuracy is the figure to watch."""

    def candidates(self, labels: Tensor) -> Tensor:
        """No image."""
        return labels.new_empty(0)

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """The images as they are."""
        return images

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """No image."""
        return images[:0]


@dataclass(frozen=True, eq=False)
class BadNets(Poisoning):
    """A pattern of pixels calls for the target class (Gu et al. 2017, arXiv:1708.06733).

    Attributes:
        pixels: ``(row, column)`` of the trigger's pixels, in every channel.
        value: What they are set to, in the normalised range [-1, 1].
    """

    pixels: Pixels = PAPER_TRIGGER
    value: float = 1.0

    def stamp(self, images: Tensor, pixels: Pixels) -> Tensor:
        """A copy of images ``[N, C, H, W]`` with the pixels set."""
        rows, columns = torch.tensor(pixels).T
        stamped = images.clone()
        stamped[:, :, rows, columns] = self.value
        return stamped

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """The images with the trigger."""
        return self.stamp(images, self.pixels)

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images of other classes, with the whole trigger."""
        return self.stamp(images[labels != self.target], self.pixels)


@dataclass(frozen=True, eq=False)
class DistributedBackdoor(BadNets):
    """DBA (Xie et al. 2020, "DBA: Distributed Backdoor Attacks against Federated Learning").

    The trigger's pixels, by row and column, are cut into one part for each attacker, at least one pixel each.
    Each trains with its part; the test is the whole trigger. Attackers beyond the number of pixels share
    parts, in turn. The paper's trigger falls into the four bars of DBA for four attackers.

    Attributes:
        attackers: Number of malicious clients.
    """

    attackers: int = 1

    @property
    def parts(self) -> tuple[Pixels, ...]:
        """Disjoint parts that together are the trigger, as equal in size as can be."""
        pixels = sorted(set(self.pixels))
        count = min(max(self.attackers, 1), len(pixels))
        cuts = [len(pixels) * part // count for part in range(count + 1)]
        return tuple(tuple(pixels[start:stop]) for start, stop in pairwise(cuts))

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """The images with the attacker's part of the trigger."""
        return self.stamp(images, self.parts[attacker % len(self.parts)])


@dataclass(frozen=True, eq=False)
class Blended(Poisoning):
    """``(1 - alpha) x + alpha pattern`` calls for the target class (Chen et al. 2017, arXiv:1712.05526).

    Attributes:
        pattern: Float32 ``[C, H, W]`` in [-1, 1].
        alpha: Share of the pattern, in training and test images.
    """

    pattern: Tensor
    alpha: float

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """The images blended with the pattern."""
        return torch.lerp(images, self.pattern.expand_as(images), self.alpha)

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images of other classes, blended with the pattern."""
        others = images[labels != self.target]
        return torch.lerp(others, self.pattern.expand_as(others), self.alpha)


@dataclass(frozen=True, eq=False)
class EdgeCase(Poisoning):
    """Images of the user's, rare or of one kind, are labelled with the target class.

    The semantic backdoor of Bagdasaryan et al. 2020 (arXiv:1807.00459), and the edge-case backdoor of Wang et
    al. 2020 (arXiv:2007.05084). They take the place of a malicious client's own images, drawn without
    replacement where there are enough.

    Attributes:
        train_images: Float32 ``[N, C, H, W]`` in [-1, 1] to train with.
        test_images: Images of the same kind to test with.
    """

    train_images: Tensor
    test_images: Tensor

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """Images of the user's, as many as are replaced."""
        available, wanted = len(self.train_images), len(images)
        if wanted <= available:
            return self.train_images[torch.randperm(available, generator=generator)[:wanted]]
        return self.train_images[torch.randint(available, (wanted,), generator=generator)]

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The user's test images."""
        return self.test_images


@dataclass(frozen=True, eq=False)
class LabelFlip(Poisoning):
    """Images of the source class are labelled with the target class (Tolpegin et al. 2020, arXiv:2007.08432).

    ``poison_share`` is that of the client's source images; it is 1 in the paper.

    Attributes:
        source: The class that should be taken for the target class.
    """

    source: int

    def candidates(self, labels: Tensor) -> Tensor:
        """The images of the source class."""
        return torch.nonzero(labels == self.source).squeeze(1)

    def poisoned(self, images: Tensor, attacker: int, generator: torch.Generator) -> Tensor:
        """The images as they are."""
        return images

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images of the source class."""
        return images[labels == self.source]


def _check_class(name: str, label: int, options: PoisonOptions) -> None:
    if label >= options.num_classes:
        raise ValueError(f"{name}: class {label} does not exist, the classes are 0..{options.num_classes - 1}")


def _check_images(options: PoisonOptions) -> None:
    if len(options.image_shape) != 3:
        raise ValueError(
            f"attack: this one changes images [C, H, W], the inputs are {list(options.image_shape)}; others can have "
            "label-flip, none or an attack of your own"
        )


def _check_trigger(options: PoisonOptions) -> None:
    _check_images(options)
    _, height, width = options.image_shape
    outside = [(row, column) for row, column in options.trigger if row >= height or column >= width]
    if outside:
        raise ValueError(f"trigger: pixels {outside} (row, column) lie outside the {height}x{width} image")


def _read_images(path: Path, names: tuple[str, ...], shape: tuple[int, ...]) -> list[Tensor]:
    """Arrays of images of a file ``*.npz``, as :func:`fdcr_fast.sim.datasets.dataset.as_images` takes them."""
    if not path.is_file():
        raise FileNotFoundError(f"attack_file: no file {path}; expected an archive *.npz with {', '.join(names)}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                raise ValueError(f"missing arrays {', '.join(missing)}; it holds {', '.join(arrays) or 'none'}")
            found = {name: as_images(arrays[name], name) for name in names}
        for name, images in found.items():
            if tuple(images.shape[1:]) != shape:
                raise ValueError(
                    f"{name}: expected images of the data's shape (channels, height, width) {shape}, "
                    f"got {tuple(images.shape[1:])}"
                )
    except Exception as error:
        raise ValueError(f"attack_file: {path}: {error}") from error
    return list(found.values())


def unpoisoned(options: PoisonOptions) -> Poisoning:
    """No poisoning."""
    return Unpoisoned(options.target, poison_share=0.0)


def badnets(options: PoisonOptions) -> Poisoning:
    """Pixels of any place and value."""
    _check_class("target", options.target, options)
    _check_trigger(options)
    return BadNets(options.target, options.poison_share, options.trigger, options.trigger_value)


def dba(options: PoisonOptions) -> Poisoning:
    """The trigger split over the attackers."""
    _check_class("target", options.target, options)
    _check_trigger(options)
    return DistributedBackdoor(
        options.target, options.poison_share, options.trigger, options.trigger_value, options.attackers
    )


def blended(options: PoisonOptions) -> Poisoning:
    """A pattern as large as the image: array ``pattern [1, H, W]`` or ``[1, H, W, C]`` of the user's file, or noise.

    The noise is uniform in [-1, 1], drawn by the seed, the same for all attackers.
    """
    _check_class("target", options.target, options)
    _check_images(options)
    if options.attack_file is None:
        generator = torch_generator(options.seed, "blend pattern")
        pattern = torch.rand(options.image_shape, generator=generator) * 2 - 1
    else:
        (patterns,) = _read_images(options.attack_file, ("pattern",), options.image_shape)
        if len(patterns) != 1:
            raise ValueError(f"attack_file: {options.attack_file}: pattern: expected one image, got {len(patterns)}")
        pattern = patterns[0]
    return Blended(options.target, options.poison_share, pattern, options.blend_alpha)


def edge_case(options: PoisonOptions) -> Poisoning:
    """Arrays ``x_train`` and ``x_test`` of the user's file, as in a data set's."""
    _check_class("target", options.target, options)
    _check_images(options)
    if options.attack_file is None:
        raise ValueError("attack_file: edge-case needs a file FILE.npz with x_train and x_test, got none")
    train, test = _read_images(options.attack_file, ("x_train", "x_test"), options.image_shape)
    return EdgeCase(options.target, options.poison_share, train, test)


def label_flip(options: PoisonOptions) -> Poisoning:
    """Source class to target class."""
    _check_class("target", options.target, options)
    _check_class("source", options.source, options)
    if options.source == options.target:
        raise ValueError(f"source: label-flip needs a class other than the target, both are {options.target}")
    return LabelFlip(options.target, options.poison_share, options.source)


ATTACKS: dict[str, Callable[[PoisonOptions], Poisoning]] = {
    "none": unpoisoned,
    "badnets": badnets,
    "blended": blended,
    "dba": dba,
    "edge-case": edge_case,
    "label-flip": label_flip,
}
