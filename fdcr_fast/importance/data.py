"""The forms in which data may come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fdcr_fast.importance.losses import num_samples


def batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """``(inputs, targets)`` of at most ``batch_size`` samples each."""
    one_batch = isinstance(data, Mapping) or (
        isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)
    )
    for batch in [data] if one_batch else data:
        inputs, targets = _pair(batch)
        for start in range(0, num_samples(targets), batch_size):
            samples = slice(start, start + batch_size)
            yield tree_map(lambda x, s=samples: x[s], inputs), tree_map(lambda x, s=samples: x[s], targets)


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: x for name, x in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        return dict(inputs) if isinstance(inputs, Mapping) else inputs, targets
    got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise ValueError(f"expected batches (inputs, targets), or mappings with labels, got {got}")


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as the model is called with them: positional and keyword arguments."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}
