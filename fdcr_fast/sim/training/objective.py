"""What local training minimises."""

from __future__ import annotations

import torch
from torch import Tensor


class Objective:
    """A loss, and a projection after every step of SGD; here those of plain training. Vectors are flat, ``[P]``."""

    def loss(self, class_loss: Tensor, params: Tensor) -> Tensor:
        """What is minimised, given the batch's cross-entropy and the parameters it was computed with."""
        return class_loss

    def grad(self, class_loss: Tensor, class_grad: Tensor, params: Tensor) -> Tensor:
        """Gradient ``[P]`` of :meth:`loss`, given the batch's cross-entropy and its gradient at the parameters."""
        of_class, of_params = class_loss.detach().requires_grad_(), params.detach().clone().requires_grad_()
        factor, own = torch.autograd.grad(
            self.loss(of_class, of_params), (of_class, of_params), allow_unused=True, materialize_grads=True
        )
        return factor * class_grad + own

    def project(self, params: Tensor) -> Tensor:
        """Where to go on from after a step led to ``params``."""
        return params
