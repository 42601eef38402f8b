"""In which precision clients train, by the names of PyTorch Lightning, which say what becomes of the weights.

``mixed`` keeps parameters, gradients as the optimizer sees them, updates, Fishers and outputs in float32; what autocast
takes to bfloat16 are the operations of the model's forward pass, and their gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line names precisions and does not wait for PyTorch
    import torch

# Not "bfloat16", which would be weights of it, nor Accelerate's "no", which is False in YAML.
Precision = Literal["32-true", "bf16-mixed"]
FULL: Precision = "32-true"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context for forward passes of training on a device.

    Weights are cast anew in every one, as a cache would outlive what ``torch.func`` made of them.

    Raises:
        ValueError: the device computes nothing in bfloat16.
    """
    if precision == FULL:
        return nullcontext()
    import torch

    try:
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    except RuntimeError as error:
        raise ValueError(f"precision: {device} cannot train in {precision}: {error}") from error
