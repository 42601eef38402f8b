"""Whether model, loss, optimizer and attack can do anything with the data, before the first round."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.sim.clients.attackers import Attackers
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import Dataset, stored
from fdcr_fast.sim.imports import one_line
from fdcr_fast.sim.parts import Parts
from fdcr_fast.sim.seeding import with_torch_seed
from fdcr_fast.sim.training.base import Classifier
from fdcr_fast.sim.training.precision import FULL

_TRIED = 2  # samples


def check_fit(
    config: SimulationConfig, parts: Parts, classifier: Classifier, dataset: Dataset, attackers: Attackers
) -> None:
    """Try everything of the user's on a few samples.

    Raises:
        ValueError: naming what does not fit, and why.
    """
    images, labels = stored(dataset.train_images[:_TRIED]), dataset.train_labels[:_TRIED]
    kind = f"inputs {str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
    try:
        logits = classifier.logits(classifier.params(), images)
    except Exception as error:  # whatever a model makes of inputs that are not for it
        raise ValueError(f"model: {config.model} cannot take {kind}: {one_line(error)}") from error
    if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < dataset.num_classes:
        raise ValueError(
            f"model: {config.model} must return [N, classes] with at least {dataset.num_classes} classes, of "
            f"{len(images)} {kind} it returned {list(logits.shape)}"
        )
    if config.precision != FULL:
        _check_gradient(config, classifier, images, labels)
    if parts.loss is not None:
        losses = parts.loss(logits, labels)
        if tuple(getattr(losses, "shape", ())) != (len(images),):
            raise ValueError(
                f"loss: {config.loss} must return the losses [N], of {len(images)} samples it returned "
                f"{list(getattr(losses, 'shape', ())) or type(losses).__name__}"
            )
    if parts.attack is not None and attackers.clients:
        try:
            attackers.poisoned(min(attackers.clients))
        except Exception as error:
            raise ValueError(f"attack: {config.attack}: {one_line(error)}") from error


def _check_gradient(config: SimulationConfig, classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Raise ValueError for a model some of whose operations do not exist in a precision, or do not mix dtypes."""
    buffers = classifier.buffers()
    try:
        with_torch_seed(0, lambda: classifier.grad(classifier.params(), images, labels, torch.arange(len(images))))
    except Exception as error:  # whatever an operation makes of bfloat16
        raise ValueError(
            f"precision: {config.model} cannot train in {config.precision}, only in {FULL}: {one_line(error)}"
        ) from error
    finally:
        classifier.load_buffers(buffers)
