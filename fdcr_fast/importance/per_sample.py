"""Squared per-sample gradients of any parameters of any model: ``vmap(grad)``, or one sample at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from fdcr_fast.importance.losses import num_samples

_log = logging.getLogger("fdcr_fast")

# Per-sample gradients alive at one time.
_MAX_BYTES = 64 << 20

# The loss of one sample, given some of the parameters: (parameters, inputs, target), without the sample dimension.
SampleLoss = Callable[[Mapping[str, Tensor], Any, Any], Tensor]


class PerSampleGradients:
    """Sums squared gradients of the losses of samples, without storing more than a chunk of them.

    ``recurrent`` says that the model has recurrent layers: under ``vmap`` oneDNN's give wrong bias gradients (seen
    with torch 2.14), so PyTorch's own are used for them.
    """

    def __init__(self, recurrent: bool) -> None:
        self._recurrent = recurrent
        self._vectorised = True

    def sum_squares(
        self, sample_loss: SampleLoss, params: dict[str, Tensor], inputs: Any, targets: Any
    ) -> dict[str, Tensor]:
        """``sum_n grad_n^2`` for each of ``params``, in at least float32."""
        sums = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
        bytes_per_sample = sum(p.numel() * p.element_size() for p in params.values())
        step = max(1, _MAX_BYTES // max(1, bytes_per_sample))
        for start in range(0, num_samples(targets), step):
            samples = slice(start, start + step)
            grads = self._of_samples(sample_loss, params, *tree_map(lambda x, s=samples: x[s], (inputs, targets)))
            for name, g in grads.items():
                sums[name] += g.to(sums[name].dtype).square_().sum(0)
        return sums

    def _of_samples(
        self, sample_loss: SampleLoss, params: dict[str, Tensor], inputs: Any, targets: Any
    ) -> dict[str, Tensor]:
        if self._vectorised:
            try:
                onednn = torch.backends.mkldnn.flags(enabled=False) if self._recurrent else nullcontext()
                with onednn, sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
                    per_sample = vmap(grad(sample_loss), in_dims=(None, 0, 0), randomness="different")
                    grads: dict[str, Tensor] = per_sample(params, inputs, targets)
                return grads
            except Exception as error:  # what vmap cannot do, it says in many ways; the loop finds real errors
                _log.info("vmap failed, one sample at a time instead: %s", error)
                self._vectorised = False
        one_by_one = [
            _of_one(sample_loss, params, *tree_map(lambda x, i=i: x[i], (inputs, targets)))
            for i in range(num_samples(targets))
        ]
        return {name: torch.stack([g[name] for g in one_by_one]) for name in params}


def _of_one(sample_loss: SampleLoss, params: dict[str, Tensor], inputs: Any, target: Any) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = sample_loss(leaves, inputs, target)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
