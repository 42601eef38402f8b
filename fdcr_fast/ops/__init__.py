"""Operators: one meaning each, one implementation per backend, reached through the PyTorch dispatcher.

A module per family holds everything about its operators but the kernels (see :mod:`fdcr_fast.ops.operator`); the
compiled extension takes the place of the references on the CPU when it loads, ``backends`` those on GPUs. Call the
functions exported here; ``torch.ops.fdcr_fast`` holds the same operators for ``torch.compile`` and
``torch.library.opcheck``.

Conventions. ``N`` samples, ``T`` positions (tokens, pixels), ``K`` clients, ``P`` parameters. Floating tensors may be
float64, float32, bfloat16 or float16, with any strides.
"""

import warnings
from typing import Any

from fdcr_fast.ops.aggregation import discrepancy, discrepancy_and_mean, norms_and_mean, rescaled_mean
from fdcr_fast.ops.central import central_mean
from fdcr_fast.ops.client_statistics import importance_range, moments, squared_norm
from fdcr_fast.ops.gram import gram
from fdcr_fast.ops.rows import fill_row, fill_rows
from fdcr_fast.ops.squared_grads import (
    sum_squared_grads_conv,
    sum_squared_grads_embedding,
    sum_squared_grads_linear,
    sum_squared_grads_norm,
)
from fdcr_fast.ops.tiles import STRETCH
from fdcr_fast.ops.vectors import aggregate_vectors, vector_range

from fdcr_fast.ops import backends  # noqa: F401  isort: skip  # kernels take the place of what is above

__all__ = [
    "STRETCH",
    "aggregate_vectors",
    "central_mean",
    "discrepancy",
    "discrepancy_and_mean",
    "fill_row",
    "fill_rows",
    "gram",
    "importance_range",
    "moments",
    "norms_and_mean",
    "rescaled_mean",
    "squared_norm",
    "sum_squared_grads_conv",
    "sum_squared_grads_embedding",
    "sum_squared_grads_linear",
    "sum_squared_grads_norm",
    "vector_range",
]

_MOVED = {  # until 0.2.0 they were here; to fdcr_fast.ops.networks
    "NetworkLayer",
    "network_grad",
    "network_outputs",
    "sgd_step",
    "sized_layers",
    "sum_squared_network_grads",
    "train_network",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fdcr_fast.ops import networks

    warnings.warn(f"fdcr_fast.ops.{name} is now fdcr_fast.ops.networks.{name}", DeprecationWarning, stacklevel=2)
    return getattr(networks, name)
