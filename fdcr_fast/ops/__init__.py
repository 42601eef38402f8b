"""Operators: one meaning each, one implementation per backend, reached through the PyTorch dispatcher.

``schemas`` defines what exists and what it accepts, ``reference`` says what it means in plain PyTorch, the compiled
extension replaces the reference on the CPU when it loads. Call the functions exported here; ``torch.ops.fdcr_fast``
holds the same operators for ``torch.compile`` and ``torch.library.opcheck``.
"""

from fdcr_fast.ops.network_schemas import (
    NetworkLayer,
    network_grad,
    network_outputs,
    sgd_step,
    sized_layers,
    sum_squared_network_grads,
    train_network,
)
from fdcr_fast.ops.schemas import (
    STRETCH,
    central_mean,
    discrepancy,
    discrepancy_and_mean,
    fill_row,
    fill_rows,
    gram,
    importance_range,
    rescaled_mean,
    squared_norm,
    sum_squared_grads_conv,
    sum_squared_grads_embedding,
    sum_squared_grads_linear,
    sum_squared_grads_norm,
)

__all__ = [
    "STRETCH",
    "NetworkLayer",
    "central_mean",
    "discrepancy",
    "discrepancy_and_mean",
    "fill_row",
    "fill_rows",
    "gram",
    "importance_range",
    "network_grad",
    "network_outputs",
    "rescaled_mean",
    "sgd_step",
    "sized_layers",
    "squared_norm",
    "sum_squared_grads_conv",
    "sum_squared_grads_embedding",
    "sum_squared_grads_linear",
    "sum_squared_grads_norm",
    "sum_squared_network_grads",
    "train_network",
]
