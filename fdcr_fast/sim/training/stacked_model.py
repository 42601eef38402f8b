"""Models of one architecture that are trained side by side as one batched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import ParamLayout
from fdcr_fast.sim.training.precision import FULL, Precision, autocast
from fdcr_fast.sim.training.sgd import SGD

NO_IMAGES = torch.empty(0, dtype=torch.int64)
MOST_GRADIENTS = 1 << 26  # numbers of gradients of single samples that are kept at a time


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: it has not.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # whatever this build of PyTorch makes of it
        raise ValueError(f"device: no such device here: {str(error).partition(chr(10))[0]}") from None


class StackedModel:
    """Copies of one architecture with parameters ``[K, P]`` of their own; one call for all of them.

    Args:
        model: The architecture, on the device where everything lies; without dropout or buffers.
        precision: What training computes in; Fishers are always of float32.
    """

    def __init__(self, model: nn.Module, precision: Precision = FULL) -> None:
        layout = ParamLayout.from_module(model)

        def loss_in(precision: Precision) -> Callable[..., Tensor]:
            def loss(params: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
                with autocast(precision, images.device):
                    logits = torch.func.functional_call(model, dict(layout.unflatten(params)), (images,))
                return F.cross_entropy(logits.float(), labels, reduction="none") @ weights

            return loss

        def one(params: Tensor, image: Tensor, label: Tensor, weight: Tensor) -> Tensor:
            return full_loss(params, image[None], label[None], weight[None])

        full_loss = loss_in(FULL)
        self._grads = torch.func.vmap(torch.func.grad(loss_in(precision)))
        self._single_grads = torch.func.vmap(torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0)))

    def train(
        self, params: Tensor, images: Tensor, labels: Tensor, batches: Sequence[Sequence[Tensor]], sgd: SGD
    ) -> Tensor:
        """Parameters ``[K, P]`` after SGD, each model by its own batches.

        Args:
            params: Where each training begins, ``[K, P]``.
            images: ``[M, C, H, W]``, those of all models.
            labels: int64 ``[M]``.
            batches: For each model its batches, indices of images, in their order.
            sgd: How it is done.
        """
        velocity = torch.zeros_like(params)
        for step in range(max(map(len, batches))):
            taken, weights = _padded([own[step] if step < len(own) else NO_IMAGES for own in batches], images.device)
            sizes = weights.sum(1, keepdim=True)
            grads = self._grads(params, images[taken], labels[taken], weights / sizes.clamp(min=1))
            going = sizes > 0
            velocity = torch.where(going, sgd.momentum * velocity + (grads + sgd.weight_decay * params), velocity)
            params = torch.where(going, params - sgd.lr * velocity, params)
        return params

    def fishers(self, params: Tensor, images: Tensor, labels: Tensor, indices: Sequence[Tensor]) -> Tensor:
        """Diagonal empirical Fishers ``[K, P]`` (eq. 5), each of its own images."""
        total = torch.zeros_like(params)
        everybody, weights = _padded(indices, images.device)
        most = max(1, MOST_GRADIENTS // params.numel())
        for part, weight in zip(everybody.split(most, 1), weights.split(most, 1), strict=True):
            total += self._single_grads(params, images[part], labels[part], weight).square().sum(1)
        return total / weights.sum(1, keepdim=True)


def _padded(indices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of different numbers as ``[K, n]``, filled up with one of the same model, and which of them count."""
    place = torch.arange(max(map(len, indices)))
    filled = [own[place.clamp(max=len(own) - 1)] if len(own) else torch.zeros_like(place) for own in indices]
    counts = torch.stack([place < len(own) for own in indices])
    return torch.stack(filled).to(device), counts.to(device, torch.float32)
