"""What ``aggregate`` is given besides a store, looked at before it is a round."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.round.arguments import all_finite, check_device, different_ids, require_finite
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.store.update_store import UpdateStore
from fdcr_fast.warning import callers_level

_FEWEST_LOOKED_AT, _LOOKED_AT = 16, 512  # parameters by which states are told from updates


def check_global(global_params: Tensor, clients: ClientUpdates) -> Tensor | None:
    """Raise unless these can be the parameters of the round.

    Returns:
        None if they are finite; on a device, where that would have to be waited for, whether they are.
    """
    if global_params.numel() != clients.num_params:
        raise ValueError(
            f"expected global_params [{clients.num_params}] like the updates, got [{global_params.numel()}]"
        )
    check_device("global_params", global_params, clients.tiles.device)
    params = global_params.detach()
    if not params.is_cpu:
        low, high = params.aminmax()
        return torch.maximum(-low, high) < torch.inf  # not of NaN either
    require_finite(all_finite(params))
    return None


def stored_vectors(
    global_params: Tensor, updates: Sequence[Any], fishers: Any, num_samples: Any, client_ids: Any
) -> UpdateStore:
    """A store of vectors that came one by one, of which each is checked by itself."""
    count = len(updates)
    for name, values in (("fishers", fishers), ("num_samples", num_samples)):
        if values is not None and len(values) != count:
            raise ValueError(f"expected {name} of {count} clients like updates, got {len(values)}")
    if count == 0:
        raise ValueError("expected at least one client, got no updates")
    ids = different_ids(client_ids, count)
    dtypes = [values.dtype for values in updates if isinstance(values, Tensor)]
    dtype = torch.float64 if torch.float64 in (*dtypes, global_params.dtype) else torch.float32
    store = UpdateStore(len(global_params), count, dtype, with_fishers=fishers is not None)
    for k, (client, update) in enumerate(zip(ids, updates, strict=True)):
        store.put(update, None if fishers is None else fishers[k], num_samples[k], client)
    return store


def warn_of_states(global_params: Tensor, clients: ClientUpdates) -> None:
    """Warn where most updates lie nearer to the global parameters than to zero, by a few of the first ones.

    Not looked at on devices, where the host would have to wait.
    """
    tiles = clients.tiles
    count = min(tiles.tile, tiles.num_params, _LOOKED_AT)
    if tiles.device.type != "cpu" or count < _FEWEST_LOOKED_AT:
        return
    w = global_params[:count].double().numpy()
    size = w @ w
    # Updates that are near are at least half as long, also by all of their parameters.
    squares = clients.squared_norm.numpy()[clients.valid_rows]
    if 2 * np.count_nonzero(squares > size / 4) <= len(squares):
        return
    delta = clients.of_valid(tiles.window(0, count).updates[0]).double().numpy()  # no square of these overflows
    near = 4 * np.square(delta - w).sum(1) < size
    if 2 * np.count_nonzero(near) > len(near):
        warnings.warn(
            "most updates are close to the global parameters: are they states w_k instead of updates w_k - w? "
            "(StateStore.put_state and aggregate_state_dicts take states)",
            stacklevel=callers_level(),
        )
