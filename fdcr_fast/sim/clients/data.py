"""What every client trains on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdcr_fast.sim.datasets.partition import Partition
from fdcr_fast.store.shared_memory import SharedTensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Some of the images ``[N, C, H, W]`` with labels ``[N]``: those with these indices, int64 ``[n]``."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class ClientData:
    """The samples of every client, made when asked for.

    Args:
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        partition: Which of them each client has.
        shared: Whether other processes can be given the data.
    """

    def __init__(self, images: Tensor, labels: Tensor, partition: Partition, shared: bool = False) -> None:
        self._partition = partition
        self.images, self.labels = images, labels
        self._shared: tuple[SharedTensor, SharedTensor] | None = None
        if shared:
            self._keep_shared(SharedTensor.of(images), SharedTensor.of(labels))

    def _keep_shared(self, images: SharedTensor, labels: SharedTensor) -> None:
        self._shared = images, labels
        self.images, self.labels = images.tensor, labels.tensor

    def __getstate__(self) -> tuple[Partition, tuple[SharedTensor, SharedTensor]]:
        assert self._shared is not None
        return self._partition, self._shared

    def __setstate__(self, state: tuple[Partition, tuple[SharedTensor, SharedTensor]]) -> None:
        self._partition, shared = state
        self._keep_shared(*shared)

    def __len__(self) -> int:
        return len(self._partition)

    def __getitem__(self, client: int) -> Samples:
        return Samples(self.images, self.labels, self._partition[client])

    def num_samples(self, client: int) -> int:
        """``n_k``."""
        return self._partition.size(client)
