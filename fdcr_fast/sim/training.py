"""Local training and evaluation of one reused model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import ParamLayout, diagonal_fisher
from fdcr_fast.sim.attacks.training import LocalAttack

EVALUATION_BATCH = 1024


class Worker:
    """One model instance that stands in for every client in turn.

    Parameters travel as flat vectors ``[P]`` in the order of ``layout``. The model itself is channels-last,
    for faster convolutions and pooling on CPU; the flat order does not depend on that.

    Args:
        model: Its parameters are overwritten by every call.

    Raises:
        ValueError: the model has buffers, which a flat vector of parameters does not carry.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [name for name, _ in model.named_buffers()]
        if buffers:
            raise ValueError(f"the simulator's models must not have buffers, got {', '.join(buffers)}")
        self.model = model.to(memory_format=torch.channels_last)
        self.layout = ParamLayout.from_module(model)

    def params(self) -> Tensor:
        """The model's parameters ``[P]``."""
        return self.layout.flatten(self.model)

    @torch.no_grad()
    def load(self, params: Tensor) -> None:
        """Set the model's parameters."""
        values = self.layout.unflatten(params)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        generator: torch.Generator,
        attack: LocalAttack | None = None,
    ) -> None:
        """Train from the loaded parameters by SGD on the given rows, reshuffled in every epoch.

        Args:
            attack: How an attacker deviates from that.
        """
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        self.model.train()
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for batch in order.split(batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(self.model(images[batch]), labels[batch])
                if attack is not None:
                    loss = attack.loss(loss, torch.cat([p.reshape(-1) for p in self.model.parameters()]))
                loss.backward()
                optimizer.step()
                if attack is not None:
                    self.load(attack.project(self.params()))
        optimizer.zero_grad()

    def fisher(self, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Diagonal empirical Fisher ``[P]`` at the current parameters (eq. 5) over the given rows."""
        self.model.eval()
        return diagonal_fisher(self.model, ((images[batch], labels[batch]) for batch in rows.split(256)))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most probable class of each image, int64 ``[N]``."""
        self.model.eval()
        return torch.cat([self.model(batch).argmax(1) for batch in images.split(EVALUATION_BATCH)])
