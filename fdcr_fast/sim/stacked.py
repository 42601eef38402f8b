"""Clients that train side by side as one batched model, which a GPU needs to be busy with small ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import ParamLayout, UpdateStore
from fdcr_fast.sim.classifier import SGD
from fdcr_fast.sim.clients import LocalWork
from fdcr_fast.sim.execution import Clients, Executor, InProcess, Job, Outcome, describe
from fdcr_fast.sim.training import shuffled

NO_ROWS = torch.empty(0, dtype=torch.int64)
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
    """

    def __init__(self, model: nn.Module) -> None:
        layout = ParamLayout.from_module(model)

        def loss(params: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, dict(layout.unflatten(params)), (images,))
            return F.cross_entropy(logits, labels, reduction="none") @ weights

        def one(params: Tensor, image: Tensor, label: Tensor, weight: Tensor) -> Tensor:
            return loss(params, image[None], label[None], weight[None])

        self._grads = torch.func.vmap(torch.func.grad(loss))
        self._single_grads = torch.func.vmap(torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0)))

    def train(
        self, params: Tensor, images: Tensor, labels: Tensor, batches: Sequence[Sequence[Tensor]], sgd: SGD
    ) -> Tensor:
        """Parameters ``[K, P]`` after SGD, each model by its own batches.

        Args:
            params: ``[K, P]``.
            images: ``[M, C, H, W]``, of all models.
            labels: int64 ``[M]``.
            batches: Of each model, its batches of rows of the images in their order.
        """
        velocity = torch.zeros_like(params)
        for step in range(max(map(len, batches))):
            rows, weights = _padded([own[step] if step < len(own) else NO_ROWS for own in batches], images.device)
            sizes = weights.sum(1, keepdim=True)
            grads = self._grads(params, images[rows], labels[rows], weights / sizes.clamp(min=1))
            going = sizes > 0
            velocity = torch.where(going, sgd.momentum * velocity + (grads + sgd.weight_decay * params), velocity)
            params = torch.where(going, params - sgd.lr * velocity, params)
        return params

    def fishers(self, params: Tensor, images: Tensor, labels: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Diagonal empirical Fishers ``[K, P]`` (eq. 5), each over its own rows."""
        total = torch.zeros_like(params)
        everybody, weights = _padded(rows, images.device)
        most = max(1, MOST_GRADIENTS // params.numel())
        for part, weight in zip(everybody.split(most, 1), weights.split(most, 1), strict=True):
            total += self._single_grads(params, images[part], labels[part], weight).square().sum(1)
        return total / weights.sum(1, keepdim=True)


def _padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ``[K, n]``, filled up with a row of the same model, and which of them count."""
    place = torch.arange(max(map(len, rows)))
    filled = [own[place.clamp(max=len(own) - 1)] if len(own) else torch.zeros_like(place) for own in rows]
    counts = torch.stack([place < len(own) for own in rows])
    return torch.stack(filled).to(device), counts.to(device, torch.float32)


class Stacked:
    """An :class:`fdcr_fast.sim.execution.Executor` that trains benign clients together, so many at a time.

    Bits depend on how many. Attackers, who may train in any way, are done one by one on the CPU, and so is a group in
    whose work there was an error, with a warning: it is then that of one client.

    Args:
        clients: Whose data are copied to the device.
        model: The architecture; not used by anybody else.
        device: Where to train.
        most: Clients at a time.

    Raises:
        ValueError: the device cannot be used here.
    """

    def __init__(self, clients: Clients, model: nn.Module, device: torch.device | str, most: int) -> None:
        self._clients = clients
        self._one_by_one: Executor = InProcess(clients)
        device = usable_device(device)
        self._model = StackedModel(model.to(device))
        self._images, self._labels = clients.data.images.to(device), clients.data.labels.to(device)
        self._most = most

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """See :class:`fdcr_fast.sim.execution.Executor`."""
        benign = [job for job in jobs if not job.attackers]
        for first in range(0, len(benign), self._most):
            yield from self._together(work, benign[first : first + self._most], store)
        yield from self._one_by_one.run(work, [job for job in jobs if job.attackers], store)

    def _together(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        try:
            rows = [self._clients.data[job.client].rows for job in jobs]
            updates, fishers = self._uploads(work, jobs, rows)
        except Exception as error:
            warnings.warn(f"{len(jobs)} clients train one by one: together they {describe(error)}", stacklevel=2)
            yield from self._one_by_one.run(work, jobs, store)
            return
        for k, job in enumerate(jobs):
            with work.clock.phase("aggregation"):
                fisher = None if fishers is None else fishers[k]
                store.put(updates[k], fisher, len(rows[k]), client_id=job.client, row=job.row)
            yield Outcome(job)

    def _uploads(self, work: LocalWork, jobs: Sequence[Job], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        config = work.config
        sgd = SGD(config.batch_size, config.lr, config.momentum, config.weight_decay)
        given = work.params.to(self._images.device)
        with work.clock.phase("training"):
            batches = [
                [
                    batch
                    for epoch in shuffled(own, job.epochs, work.shuffle(job.client))
                    for batch in epoch.split(sgd.batch_size)
                ]
                for job, own in zip(jobs, rows, strict=True)
            ]
            params = self._model.train(given.expand(len(jobs), -1), self._images, self._labels, batches, sgd)
            updates = (params - given).cpu()
        if not self._clients.with_fishers:
            return updates, None
        with work.clock.phase("fisher"):
            taken = [work.fisher_rows(own) for own in rows]
            return updates, self._model.fishers(params, self._images, self._labels, taken).cpu()

    def close(self) -> None:
        """Nothing to end."""
