"""Calls of every operator, small and awkward: for the check of an installation, and the tests of what is registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.ops.conv3x3 import CHANNELS
from fdcr_fast.ops.networks import NetworkLayer

F16, BF16, F64 = torch.float16, torch.bfloat16, torch.float64


def samples(params: int = 10, device: str = "cpu") -> dict[str, list[tuple[Any, ...]]]:
    """Arguments by the operator's name; numbers are from PyTorch's global generator of the CPU.

    Args:
        params: Parameters ``P`` of the clients; at least 10.
        device: Where the tensors are that kernels read. Which clients and parameters are read is on the CPU.
    """

    def randn(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype).to(device)

    def zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    updates, fishers = randn(1, 3, params), randn(1, 3, params).square()
    low, high = ops.importance_range(fishers, params)
    own, own_fishers = [randn(4), randn(3 * params - 4, dtype=BF16)], [fishers[0, 0], fishers[0, 1:].reshape(-1)]
    alpha = zeros(3, dtype=F64) + 1 / 3
    read = torch.ones(3, dtype=torch.bool)
    ranges, sums = [torch.tensor([[0, 3], [4, params]])] * 2, zeros(2, 3, 3, dtype=F64)
    totals, extremes = zeros(7, dtype=F64), torch.tensor([0.0, torch.inf, -torch.inf], dtype=F64)
    layers = [*NetworkLayer(4, 3, 3, pool=1, relu=1), *NetworkLayer(3)]
    network, images = randn(127), randn(5, 2, 6, 7)
    labels, rows = torch.tensor([0, 1, 2, 1, 0], device=device), torch.arange(3, device=device)
    tokens = torch.tensor([[0, 1, 0], [4, -1, 2]], device=device)
    return {
        "network_outputs": [(network, images, rows, layers)],
        "network_grad": [(network, images, labels, rows, layers)],
        "sum_squared_network_grads": [(network, images, labels, rows, layers)],
        "train_network": [(network, images, labels, rows[None], layers, 2, 0.1, 0.9, 1e-3)],
        "sgd_step": [(*randn(3, params), 0.1, 0.9, 1e-3)],
        "conv3x3": [(randn(2, 3, 4, CHANNELS), randn(2 * CHANNELS, 3, 3, CHANNELS))],
        "conv3x3_input_grad": [(randn(2, 3, 4, 2 * CHANNELS), randn(2 * CHANNELS, 3, 3, CHANNELS))],
        "conv3x3_weight_grad": [(randn(2, 3, 4, 2 * CHANNELS), randn(2, 3, 4, CHANNELS))],
        "sum_squared_grads_linear": [
            (randn(2, 3, 4), randn(2, 3, 5)),
            (randn(2, 1, 4, dtype=F64), randn(2, 1, 5)),
        ],
        "sum_squared_grads_conv": [(randn(2, 4, 3, 3), randn(2, 2, 5, 5), [3, 3], [1, 1], [0, 0], [1, 1], 2)],
        "sum_squared_grads_norm": [
            (*randn(2, 2, 3, 2, 4, 5), None, None, 1e-5),
            (*randn(2, 2, 3, 1, 4, 1), zeros(1, 4), zeros(1, 4) + 1, 1e-5),
        ],
        "sum_squared_grads_embedding": [(randn(2, 3, 4), tokens, 5)],
        "fill_row": [
            ([randn(4), randn(params - 4, dtype=BF16)], zeros(params // 4 + 1, 4), extremes.clone()),
            ([randn(params)], zeros(params // 4 + 1, 4), extremes.clone(), randn(params)),
        ],
        "fill_rows": [
            ([randn(4), randn(2 * params - 4, dtype=BF16)], zeros(params // 4 + 1, 2, 4)),
            ([randn(2 * params)], zeros(params // 4 + 1, 2, 4, dtype=F64), randn(params)),
        ],
        "importance_range": [(fishers, params)],
        "squared_norm": [(updates, params)],
        "moments": [
            (
                updates,
                [randn(params, dtype=F64), zeros(0, dtype=F64)],
                read,
                ranges,
                sums[:, :2],
                params,
                [True, False],
            ),
        ],
        "discrepancy": [
            (updates, fishers, low, high, alpha, totals, params, False),
            (updates, None, None, None, alpha, totals, params, True),
        ],
        "rescaled_mean": [
            (randn(params), updates, fishers, low, high, alpha, True),
            (randn(params, dtype=BF16), updates, None, None, None, alpha, False),
        ],
        "discrepancy_and_mean": [
            (randn(params), updates, fishers, low, high, alpha, alpha, totals, True, True, False),
            (randn(params), updates, None, None, None, alpha, alpha, totals, False, False, True),
        ],
        "norms_and_mean": [(randn(params), updates, alpha, totals[:3], False)],
        "vector_range": [([randn(4), randn(params - 4), randn(params, dtype=BF16)], 2)],
        "aggregate_vectors": [
            (randn(params), own, randn(params), own_fishers, low, high, alpha, alpha, totals, True, True, False),
            (randn(params), own, None, [], None, None, None, alpha, totals[:3], False, False, True),
            (None, own, None, [], None, None, alpha, None, totals, False, False, True),
        ],
        "central_mean": [
            (randn(params), updates, read, 1, False),
            (randn(params, dtype=F16), updates.double(), read, 2, True),
        ],
        "gram": [
            (updates, fishers, low, high, read, ["update", "fourth_root_fisher"], ranges, sums, params, True),
            (updates.double(), None, None, None, read, ["update"], ranges[:1], sums[:1], params, False),
        ],
    }
