"""Aggregation of whole state dicts: parameters by a rule, buffers by the mean of the clients it keeps."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.layout import ParamLayout, as_tensor
from fdcr_fast.server.intake import OnInvalid, median_size
from fdcr_fast.server.rules import FDCR, AggregationResult, AggregationRule
from fdcr_fast.server.store import UpdateStore
from fdcr_fast.server.vectors import shown

State: TypeAlias = Mapping[str, Any]
PerClient: TypeAlias = Sequence[Any] | Mapping[Hashable, Any]

_BATCH_NORM_STATISTICS = ("running_mean", "running_var")


@overload
def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | None,
    num_samples: PerClient | Tensor,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    return_result: Literal[False] = False,
) -> dict[str, Any]: ...


@overload
def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | None,
    num_samples: PerClient | Tensor,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    return_result: Literal[True],
) -> tuple[dict[str, Any], AggregationResult]: ...


def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | None,
    num_samples: PerClient | Tensor,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    return_result: bool = False,
) -> dict[str, Any] | tuple[dict[str, Any], AggregationResult]:
    """New global state from the clients' states.

    Parameters go through ``rule``. Floating-point buffers become the mean over the clients that it kept, with
    its weights; integer buffers (``num_batches_tracked``) the rounded mean; all else stays as in the global
    state, and so does everything if nobody is kept. Shared tensors, which several entries of ``global_state``
    hold, are one parameter, and are shared in the result.

    Args:
        global_state: State that was sent out, ``w``.
        client_states: States ``w_k`` in a sequence, or in a mapping by client id.
        fishers: Per client a vector ``[P]`` in the order of ``layout``, or a mapping by parameter name; all
            in a sequence, or in a mapping by client id. None if the rule takes no importances.
        num_samples: ``n_k`` in a sequence or mapping likewise.
        rule: By default :class:`FDCR`.
        layout: Which entries are parameters. By default the names in the Fishers; for vectors, all
            floating-point entries, or these without BatchNorm's running statistics, whichever have ``P``
            elements.
        client_ids: For sequences, by default 0 to K - 1.
        on_invalid: See :meth:`AggregationRule.aggregate`.
        return_result: Also return the rule's :class:`AggregationResult`.

    Returns:
        A state with the keys, order, dtypes and devices of ``global_state`` and no memory in common with any
        input.

    Raises:
        ValueError: numbers of clients differ, or the parameters cannot be told from the buffers. A client
            with missing or misshaped entries, or with buffers that are not finite or (where the rule has a
            ``norm_bound``) larger than that times what is usual, is rejected instead.
    """
    rule = FDCR() if rule is None else rule
    ids = _client_ids(client_states, client_ids)
    states = dict(zip(ids, _per_client("client_states", client_states, ids), strict=True))
    counts = _per_client("num_samples", num_samples, ids)
    client_fishers = [None] * len(ids) if fishers is None else _per_client("fishers", fishers, ids)
    if layout is None:
        layout = _infer_layout(global_state, client_fishers)
    owners = _owners(global_state, layout)
    buffers = {name: value for name, value in global_state.items() if name not in owners and _is_mean(value)}

    vector = layout.flatten(global_state)
    vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
    store = UpdateStore(
        layout.numel,
        len(ids),
        vector.dtype,
        device=vector.device,
        with_fishers=rule.needs_fishers and fishers is not None,
    )
    strange = _strange_buffers(states, buffers, rule.norm_bound)
    for client, count, fisher in zip(ids, counts, client_fishers, strict=True):
        try:
            if client in strange:
                raise ValueError(strange[client])
            update = layout.flatten(states[client], vector.dtype).to(vector.device) - vector
            flat = layout.flatten(fisher) if isinstance(fisher, Mapping) and store.with_fishers else fisher
        except Exception as error:  # noqa: PERF203  # the state is the client's, and so is whatever it raises
            store.reject(client, shown(error, str))
        else:
            store.put(update, flat, count, client)
    result = rule.aggregate(vector, store, on_invalid=on_invalid)

    params = layout.unflatten(result.params)
    fresh = {
        name: params[name].to(global_state[name].device, global_state[name].dtype, copy=True) for name in layout.names
    }
    state: dict[str, Any] = {}
    for name, value in global_state.items():
        if name in owners:
            state[name] = fresh[owners[name]]
        elif name in buffers:
            state[name] = _weighted_mean(name, value, states, result)
        else:
            state[name] = copy.deepcopy(value)
    return (state, result) if return_result else state


def _client_ids(client_states: PerClient, client_ids: Sequence[Hashable] | None) -> list[Hashable]:
    if isinstance(client_states, Mapping):
        if client_ids is not None:
            raise ValueError("client_states is a mapping by client id: do not give client_ids as well")
        ids = list(client_states)
    else:
        ids = list(range(len(client_states)) if client_ids is None else client_ids)
    if not ids:
        raise ValueError("expected the state of at least one client")
    if len(set(ids)) != len(ids):
        raise ValueError(f"expected different client ids, got {ids}")
    return ids


def _per_client(name: str, values: PerClient | Tensor, ids: list[Hashable]) -> list[Any]:
    """One value per client in the order of ``ids``; None where a mapping has none."""
    if isinstance(values, Mapping):
        known = set(ids)
        unknown = [client for client in values if client not in known]
        if unknown:
            raise ValueError(f"{name} of clients without a state: {unknown}")
        return [values.get(client) for client in ids]
    if len(values) != len(ids):
        raise ValueError(f"expected {name} of {len(ids)} clients, got {len(values)}")
    return list(values)


def _infer_layout(global_state: State, fishers: list[Any]) -> ParamLayout:
    """Layout that fits the names or the length of most clients' Fishers: no single client decides it."""
    forms: Counter[frozenset[str] | int] = Counter()
    for fisher in fishers:
        if isinstance(fisher, Mapping):
            forms[frozenset(fisher)] += 1
        elif isinstance(fisher, Tensor | np.ndarray):
            forms[math.prod(fisher.shape)] += 1
    form = forms.most_common(1)[0][0] if forms else None
    if isinstance(form, frozenset):
        unknown = sorted(form - global_state.keys())
        if unknown:
            raise ValueError(f"fishers name parameters that global_state lacks: {', '.join(unknown)}")
        return ParamLayout.from_tensors({name: global_state[name] for name in global_state if name in form})

    first: dict[Hashable, str] = {}
    for name, value in global_state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            first.setdefault(_memory(name, value), name)
    everything = ParamLayout.from_tensors({name: global_state[name] for name in first.values()})
    parameters = ParamLayout.from_tensors(
        {name: global_state[name] for name in everything.names if not name.endswith(_BATCH_NORM_STATISTICS)}
    )
    if form == everything.numel:
        return everything
    if form is None or form == parameters.numel:
        return parameters
    raise ValueError(
        f"fishers have {form} elements, the floating-point entries of global_state {everything.numel}, "
        f"without BatchNorm statistics {parameters.numel}: give layout=ParamLayout.from_module(model)"
    )


def _owners(global_state: State, layout: ParamLayout) -> dict[str, str]:
    """The parameter behind every entry that is one, under its own name or another."""
    owner = {_memory(name, global_state[name]): name for name in layout.names if name in global_state}
    return {
        name: name if name in layout.slices else owner[_memory(name, value)]
        for name, value in global_state.items()
        if name in layout.slices or _memory(name, value) in owner
    }


def _memory(name: str, value: Any) -> Hashable:
    """Equal for entries that are the same tensor."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return name
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def _is_mean(value: Any) -> bool:
    """Whether a buffer is averaged: real numbers are, flags and complex numbers are not."""
    return isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex()


def _strange_buffers(states: Mapping[Hashable, State], buffers: State, norm_bound: float | None) -> dict[Hashable, str]:
    """Why clients are rejected for their buffers.

    Besides buffers that are missing, misshaped or not finite, those with an entry larger than ``norm_bound`` times the
    median over the clients of their largest entries, or the largest entry of the global buffer if that is more.
    """
    strange: dict[Hashable, str] = {}
    for name, expected in buffers.items():
        sizes: dict[Hashable, float] = {}
        for client in [client for client in states if client not in strange]:
            try:
                sizes[client] = _largest_entry(name, states[client], expected.shape)
            except Exception as error:  # noqa: PERF203  # the state is the client's
                strange[client] = shown(error, str)
        if norm_bound is None or not sizes:
            continue
        own = expected.double().abs().max().item() if expected.numel() else 0.0
        usual = max(median_size(torch.tensor(list(sizes.values()), dtype=torch.float64)), own)
        for client, size in sizes.items():
            if size > norm_bound * usual:
                strange[client] = (
                    f"buffer {name} has an entry of size {size:.4g}, beyond {norm_bound:g} times the usual {usual:.4g}"
                )
    return strange


def _largest_entry(name: str, state: State, shape: torch.Size) -> float:
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state dict, got {type(state).__name__}")
    if name not in state:
        raise ValueError(f"missing buffer: {name}")
    value = as_tensor(state[name])
    if value.shape != shape:
        raise ValueError(f"buffer {name} has shape {list(value.shape)}, expected {list(shape)}")
    if value.numel() == 0:
        return 0.0
    size = value.double().abs().max().item()
    if not math.isfinite(size):
        raise ValueError(f"buffer {name} is not finite")
    return size


def _weighted_mean(name: str, value: Tensor, states: Mapping[Hashable, State], result: AggregationResult) -> Tensor:
    if not result.kept.any():
        return value.detach().clone()
    mean = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    for client, weight in zip(result.clients, result.weights.tolist(), strict=True):
        if weight:
            mean += weight * as_tensor(states[client][name]).to(value.device, torch.float64)
    return (mean if value.is_floating_point() else mean.round()).to(value.dtype)
