"""Aggregation of whole state dicts: parameters by a rule, buffers by the mean of the clients it keeps."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Sized
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout, by_plain_name
from fdcr_fast.round.arguments import different_ids
from fdcr_fast.round.screening import OnEmpty, OnInvalid, reasons
from fdcr_fast.rules.base import AggregationRule, as_rule
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.state_dicts.entries import State, floating_layout, parameter_layout, without_ties
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.warning import callers_level

PerClient: TypeAlias = Sequence[Any] | Mapping[Hashable, Any]


@overload
def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | Tensor | None = None,
    num_samples: PerClient | Tensor | None = None,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    on_empty: OnEmpty = "raise",
    return_result: Literal[False] = False,
) -> dict[str, Any]: ...


@overload
def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | Tensor | None = None,
    num_samples: PerClient | Tensor | None = None,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    on_empty: OnEmpty = "raise",
    return_result: Literal[True],
) -> tuple[dict[str, Any], AggregationResult]: ...


def aggregate_state_dicts(
    global_state: State,
    client_states: PerClient,
    fishers: PerClient | Tensor | None = None,
    num_samples: PerClient | Tensor | None = None,
    *,
    rule: AggregationRule | None = None,
    layout: ParamLayout | None = None,
    client_ids: Sequence[Hashable] | None = None,
    on_invalid: OnInvalid = "reject",
    on_empty: OnEmpty = "raise",
    return_result: bool = False,
) -> dict[str, Any] | tuple[dict[str, Any], AggregationResult]:
    """New global state from the clients' states.

    Parameters go through ``rule``, buffers as :class:`StateStore` says, which takes the states one by one.

    Args:
        global_state: State that was sent out, ``w``: a state dict or a module.
        client_states: States ``w_k``, state dicts or modules, in a sequence, or in a mapping by client id.
        fishers: Per client a vector ``[P]`` or a sequence in the order of ``layout``, or a mapping by parameter name;
            all in a sequence, or in a mapping by client id. None if the rule takes no importances.
        num_samples: ``n_k`` in a sequence, or in a mapping by client id. None if the rule does not weigh by them.
        rule: Rule for the parameters, by default :class:`FDCR`.
        layout: Entries that are parameters. By default those of a module, or the names in the Fishers; for vectors,
            all floating-point entries, or these without BatchNorm's running statistics, whichever have ``P``
            elements, with what is tied once or as often as it has names.
        client_ids: Ids of the clients in sequences, by default 0 to K - 1.
        on_invalid: Option of :meth:`AggregationRule.aggregate`, and so is ``on_empty``.
        return_result: Whether the rule's :class:`AggregationResult` is returned as well. Without it a warning names
            rejected clients.

    Returns:
        A state with the keys, order, dtypes and devices of ``global_state`` and no memory in common with any
        input.

    Raises:
        TypeError: sample counts are missing that the rule weighs by.
        ValueError: numbers of clients differ, the parameters cannot be told from the buffers, or no client can be
            used. A client with missing or misshaped entries, or with buffers that are not finite, is rejected
            instead.
    """
    rule = FDCR() if rule is None else as_rule(rule)
    ids = _client_ids(client_states, client_ids)
    states = _per_client("client_states", client_states, ids)
    _, num_samples = rule.needed(fishers, num_samples, len(ids))  # Fishers also tell what the parameters are
    counts = _per_client("num_samples", num_samples, ids)
    client_fishers = [None] * len(ids) if fishers is None else _per_client("fishers", fishers, ids)
    if layout is None and not isinstance(global_state, nn.Module):
        layout = _infer_layout(global_state, states, client_fishers)
    store = StateStore(global_state, len(ids), layout=layout, with_fishers=rule.needs_fishers, copy=False)
    for client, state, count, fisher in zip(ids, states, counts, client_fishers, strict=True):
        store.put_state(state, fisher if rule.needs_fishers else None, count, client)
    state, result = store.aggregate(rule, on_invalid=on_invalid, on_empty=on_empty)
    if return_result:
        return state, result
    if result.rejected and len(result.rejected) < len(ids):
        warnings.warn(
            f"{len(result.rejected)} of {len(ids)} clients were rejected: {reasons(result.rejected)}",
            stacklevel=callers_level(),
        )
    return state


def _client_ids(client_states: PerClient, client_ids: Sequence[Hashable] | None) -> list[Hashable]:
    if isinstance(client_states, Mapping):
        if client_ids is not None:
            raise ValueError("client_states is a mapping by client id: do not give client_ids as well")
        ids = list(client_states)
    else:
        ids = list(different_ids(client_ids, _count("client_states", client_states)))
    if not ids:
        raise ValueError("expected the state of at least one client")
    return ids


def _per_client(name: str, values: PerClient | Tensor, ids: list[Hashable]) -> list[Any]:
    """One value per client in the order of ``ids``; None where a mapping has none."""
    if isinstance(values, Mapping):
        known = set(ids)
        unknown = [client for client in values if client not in known]
        if unknown:
            raise ValueError(f"{name} of clients without a state: {unknown}")
        return [values.get(client) for client in ids]
    if _count(name, values) != len(ids):
        raise ValueError(f"expected {name} of {len(ids)} clients, got {len(values)}")
    return list(values)


def _count(name: str, values: Any) -> int:
    if not isinstance(values, Sized):
        raise TypeError(f"expected {name} of every client, in a sequence or a mapping, got {values!r}")
    return len(values)


def _infer_layout(global_state: Mapping[str, Any], states: list[Any], fishers: list[Any]) -> ParamLayout:
    """Layout that fits the names or the length of most clients' Fishers: no single client decides it."""
    forms: Counter[frozenset[str] | int] = Counter()
    for fisher in fishers:
        if isinstance(fisher, Mapping):
            forms[frozenset(by_plain_name(fisher))] += 1
        elif isinstance(fisher, Tensor | np.ndarray):
            forms[math.prod(fisher.shape)] += 1
        elif isinstance(fisher, list | tuple):
            forms[sum(math.prod(np.shape(part)) for part in fisher)] += 1
    form = forms.most_common(1)[0][0] if forms else None
    if isinstance(form, frozenset):
        plain = by_plain_name({name: name for name in global_state})
        unknown = sorted(form - plain.keys())
        if unknown:
            raise ValueError(f"fishers name parameters that global_state lacks: {', '.join(unknown)}")
        names = [name for key, name in plain.items() if key in form]
        return ParamLayout.from_tensors({name: global_state[name] for name in names})

    layouts = [floating_layout(global_state), parameter_layout(global_state)]
    if form is None:
        return layouts[1]
    for layout in layouts:
        for each in (layout, without_ties(layout, global_state, states)):
            if each.numel == form:
                return each
    everything, parameters = layouts
    raise ValueError(
        f"fishers have {form} elements, the floating-point entries of global_state {everything.numel}, "
        f"without BatchNorm statistics {parameters.numel}: give layout=ParamLayout.from_module(model)"
    )
