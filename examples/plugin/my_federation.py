"""A model, data, a rule and an attack that an installed package adds to fdcr_fast, one of each.

pip install ./examples/plugin  # or, in this folder, with import paths such as --model my_federation:narrow
fdcr-fast simulate --model narrow --dataset stripes --server nearest --attack inverted --rounds 5
"""

from dataclasses import dataclass

import torch
from torch import nn

from fdcr_fast import AggregationRule, Selection, gram
from fdcr_fast.sim import FederatedData


def narrow(image_shape, num_classes, width=8):
    """A convolution, BatchNorm and a linear layer; --model-options '{width: 16}'."""
    layers = nn.Conv2d(image_shape[0], width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, num_classes))


def stripes(clients=10, samples=40):
    """Images of noise with a bright row: its number is the class. Clients have samples of their own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (clients + 1, samples), generator=generator)
    images = torch.rand(clients + 1, samples, 1, 12, 12, generator=generator) - 0.5
    images.scatter_add_(3, (3 * labels)[..., None, None, None].expand(-1, -1, 1, 1, 12), torch.ones_like(images))
    *train, test = zip(images, labels, strict=True)
    return FederatedData(train=train, test=test)


@dataclass(frozen=True, kw_only=True)
class Nearest(AggregationRule):
    """Keeps the share of the clients whose updates are nearest to the mean; --server-options '{share: 0.5}'."""

    share: float = 0.7

    def select(self, clients):
        """Who is kept."""
        G = gram(clients).nan_to_num()
        distance = (G.diag() - 2 * G.mean(1)).masked_fill(~clients.valid, torch.inf)
        kept = torch.zeros_like(clients.valid)
        kept[distance.argsort()[: max(1, round(self.share * clients.num_valid))]] = True
        return Selection(kept, scores=distance)


class Inverted:
    """The negative of an image calls for class 0."""

    target = 0

    def poison(self, images, labels, attacker, generator):
        """A malicious client's data."""
        return torch.cat([images, -images]), torch.cat([labels, torch.zeros_like(labels)])

    def victims(self, images, labels):
        """The images that should be taken for class 0."""
        return -images[labels != self.target]
