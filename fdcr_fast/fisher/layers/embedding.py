"""The rule of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdcr_fast import ops
from fdcr_fast.fisher.layers.table import entered


@entered(nn.Embedding, own_dims=lambda module: 0)
def embedding(module: nn.Module, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The rule of embeddings. The result is sparse, of rows that were looked up, so that work grows with the tokens.

    With ``scale_grad_by_freq`` a token's frequency is that within its sample, as for a sample on its own. ``max_norm``
    shortens looked up rows in place before they are used, as in every forward pass; the gradient is that of the
    shortened row. ``sparse`` makes no difference.
    """
    assert isinstance(module, nn.Embedding)
    tokens = input.reshape(len(input), -1).long()
    grad = grad_output.reshape(*tokens.shape, module.embedding_dim)
    rows, row = tokens.unique(return_inverse=True)
    if module.scale_grad_by_freq:
        samples = torch.arange(len(tokens), device=tokens.device)[:, None]
        _, pair, counts = (row * len(tokens) + samples).unique(return_inverse=True, return_counts=True)
        grad = grad / counts[pair][..., None]
    if module.padding_idx is not None:
        row = row.masked_fill(tokens == module.padding_idx, -1)
    squares = ops.sum_squared_grads_embedding(grad, row, len(rows))
    size = (module.num_embeddings, module.embedding_dim)
    sparse = torch.sparse_coo_tensor(rows[None], squares, size, is_coalesced=True, check_invariants=False)
    return {"weight": sparse}
