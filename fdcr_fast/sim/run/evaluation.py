"""How good a global model is: accuracy and loss on the test images, success of the attack, and whether it is dead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast.sim.training.base import Classifier

# What a global model can suffer from: name, and what it then does.
PROBLEMS = {
    "diverged": "has diverged: its loss is not finite, or no upload could be used",
    "constant": "predicts one class for all test images",
    "chance": "is no better than always predicting the most frequent class",
}


class Evaluation(NamedTuple):
    """How good one global model is; see :class:`fdcr_fast.sim.RoundRecord`."""

    accuracy: float
    loss: float | None
    attack_success_rate: float | None
    problem: str | None


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Tests global models.

    Attributes:
        images: Clean test images ``[N, C, H, W]``.
        labels: Their classes, int64 ``[N]``.
        victims: Images that a successful attack makes the model take for the target class, ``[V, C, H, W]``.
        target: That class, or one for each of them, ``[V]``.
    """

    images: Tensor
    labels: Tensor
    victims: Tensor
    target: Tensor | int

    def __call__(self, classifier: Classifier, params: Tensor, buffers: Tensor | None = None) -> Evaluation:
        """Evaluate the model with parameters ``[P]`` and buffers ``[B]``."""
        logits = classifier.logits(params, self.images, buffers).double()
        loss, predicted = F.cross_entropy(logits, self.labels).item(), logits.argmax(1)
        finite = math.isfinite(loss) and bool(torch.isfinite(params).all())
        some = len(self.victims) > 0
        success = match_rate(classifier.predict(params, self.victims, buffers), self.target) if some else None
        return Evaluation(
            accuracy=match_rate(predicted, self.labels),
            loss=loss if math.isfinite(loss) else None,
            attack_success_rate=success,
            problem=problem_of(predicted, self.labels) if finite else "diverged",
        )


def match_rate(predicted: Tensor, expected: Tensor | int) -> float:
    """Share of one or more predictions that equal what is expected."""
    return (predicted == expected).double().mean().item()


def problem_of(predicted: Tensor, labels: Tensor) -> str | None:
    """What is wrong with a model that predicts these classes, int64 ``[N]``, for images of those.

    ``"constant"`` if it predicts one class for all of them; ``"chance"`` if its accuracy is at most ``c + 2 s`` with
    the share ``c`` of the most frequent class and the standard error ``s = sqrt(c (1 - c) / N)`` of an accuracy of
    ``c``. Images of a single class tell nothing.
    """
    chance = labels.bincount().max().item() / len(labels)
    if chance == 1:
        return None
    if bool((predicted == predicted[0]).all()):
        return "constant"
    standard_error = math.sqrt(chance * (1 - chance) / len(labels))
    return "chance" if match_rate(predicted, labels) <= chance + 2 * standard_error else None
