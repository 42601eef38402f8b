"""The clients of a round trained side by side as one batched model, which a GPU needs to be busy with small ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fdcr_fast import UpdateStore
from fdcr_fast.sim.clients.population import Job, Population
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.execution.contract import Executor, Outcome, describe
from fdcr_fast.sim.execution.in_process import InProcess
from fdcr_fast.sim.training.precision import FULL, Precision, autocast
from fdcr_fast.sim.training.stacked_model import StackedModel, usable_device


class Stacked:
    """An :class:`fdcr_fast.sim.execution.Executor` that trains benign clients together, so many at a time.

    Bits depend on how many. Attackers, who may train in any way, are done one by one on the CPU, and so is a group in
    whose work there was an error, with a warning: it is then that of one client.

    Args:
        population: All clients, whose data are copied to the device.
        model: The architecture; not used by anybody else.
        device: Where to train.
        most: Clients at a time.
        precision: What they train in.

    Raises:
        ValueError: the device cannot be used here, or not in this precision.
    """

    def __init__(
        self,
        population: Population,
        model: nn.Module,
        device: torch.device | str,
        most: int,
        precision: Precision = FULL,
    ) -> None:
        self._population = population
        self._one_by_one: Executor = InProcess(population)
        device = usable_device(device)
        autocast(precision, device)  # which says whether the device can, before clients fail one by one
        self._model = StackedModel(model.to(device), precision)
        self._images, self._labels = population.data.images.to(device), population.data.labels.to(device)
        self._most = most

    def run(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        """Perform the jobs; see :class:`fdcr_fast.sim.execution.Executor`."""
        benign = [job for job in jobs if not job.attackers]
        for first in range(0, len(benign), self._most):
            yield from self._together(work, benign[first : first + self._most], store)
        yield from self._one_by_one.run(work, [job for job in jobs if job.attackers], store)

    def _together(self, work: LocalWork, jobs: Sequence[Job], store: UpdateStore) -> Iterator[Outcome]:
        try:
            indices = [self._population.data[job.client].indices for job in jobs]
            updates, fishers = self._uploads(work, jobs, indices)
        except Exception as error:
            warnings.warn(f"{len(jobs)} clients train one by one: together they {describe(error)}", stacklevel=2)
            yield from self._one_by_one.run(work, jobs, store)
            return
        for k, job in enumerate(jobs):
            with work.clock.phase("aggregation"):
                fisher = None if fishers is None else fishers[k]
                store.put(updates[k], fisher, len(indices[k]), client_id=job.client, row=job.row)
            yield Outcome(job)

    def _uploads(self, work: LocalWork, jobs: Sequence[Job], indices: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        sgd = work.config.sgd
        given = work.params.to(self._images.device)
        with work.clock.phase("training"):
            batches = [
                [batch for epoch in work.order(job.client, own, job.epochs) for batch in epoch.split(sgd.batch_size)]
                for job, own in zip(jobs, indices, strict=True)
            ]
            params = self._model.train(given.expand(len(jobs), -1), self._images, self._labels, batches, sgd)
            updates = (params - given).cpu()
        if not self._population.with_fishers:
            return updates, None
        with work.clock.phase("fisher"):
            taken = [work.fisher_indices(own) for own in indices]
            return updates, self._model.fishers(params, self._images, self._labels, taken).cpu()

    def close(self) -> None:
        """End nothing, as nothing runs elsewhere."""
