"""What malicious clients do: to their data, and to the Fisher they upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pixels = tuple[tuple[int, int], ...]
PAPER_TRIGGER: Pixels = tuple((row, column) for row in (0, 2) for column in (0, 1, 2, 4, 5, 6))


@dataclass(frozen=True)
class BadNets:
    """Pixel-pattern backdoor (Gu et al. 2017): images with the trigger are labelled with the target class.

    Attributes:
        target: The class that the trigger should call for.
        poison_share: Share of a malicious client's images that carry the trigger.
        pixels: ``(row, column)`` of the trigger's pixels, in every channel.
        value: What they are set to, in the normalised range [-1, 1].
    """

    target: int
    poison_share: float
    pixels: Pixels = PAPER_TRIGGER
    value: float = 1.0

    def stamp(self, images: Tensor) -> Tensor:
        """A copy of images ``[N, C, H, W]`` with the trigger."""
        rows, columns = torch.tensor(self.pixels).T
        stamped = images.clone()
        stamped[:, :, rows, columns] = self.value
        return stamped

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A copy of a client's data with ``round(poison_share * N)`` of the images, at random, poisoned."""
        count = round(self.poison_share * len(labels))
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        images, labels = images.clone(), labels.clone()
        images[chosen] = self.stamp(images[chosen])
        labels[chosen] = self.target
        return images, labels

    def check(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Raise ValueError if the target is no class, or the trigger lies outside the image."""
        if self.target >= num_classes:
            raise ValueError(f"target: class {self.target} does not exist, the classes are 0..{num_classes - 1}")
        _, height, width = image_shape
        outside = [pixel for pixel in self.pixels if pixel[0] >= height or pixel[1] >= width]
        if outside:
            raise ValueError(f"trigger: pixels {outside} (row, column) lie outside the {height}x{width} image")


ATTACKS: dict[str, Callable[[int, float, Pixels, float], BadNets]] = {"badnets": BadNets}


def honest_fisher(fisher: Tensor, _generator: torch.Generator) -> Tensor:
    """The Fisher of the client's own, poisoned, data."""
    return fisher


def random_fisher(fisher: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise instead of the Fisher, shifted to start at zero.

    The authors' published server puts ``randn`` in place of the Fisher of the clients that it knows to be
    malicious. Here it is the attacker who does so. Importance is invariant to any affine map of the Fisher,
    so the shift leaves it as it is; it only avoids the negative entries that no Fisher has.
    """
    noise = torch.randn(fisher.shape, generator=generator, dtype=fisher.dtype)
    return noise - noise.min()


ATTACKER_FISHERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "honest": honest_fisher,
    "random": random_fisher,
}
