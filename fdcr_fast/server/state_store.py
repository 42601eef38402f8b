"""The clients' state dicts of one round, taken in as they arrive: parameters into a store, buffers beside it."""

from __future__ import annotations

import copy
import os
from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fdcr_fast.layout import ParamLayout, as_tensor
from fdcr_fast.server.intake import OnInvalid, median_size
from fdcr_fast.server.rules import AggregationResult, AggregationRule
from fdcr_fast.server.store import UpdateStore
from fdcr_fast.server.vectors import FLOATS, shown

State: TypeAlias = Mapping[str, Any]

_BATCH_NORM_STATISTICS = ("running_mean", "running_var")


class StateStore:
    """An :class:`UpdateStore` for servers that receive whole state dicts, one client after the other.

    Parameters go into the store as updates ``w_k - w``. Floating-point buffers become the mean over the clients that
    the rule kept, with its weights; integer buffers (``num_batches_tracked``) the rounded mean; all else stays as in
    the global state, and so does everything if nobody is kept. Shared tensors, which several entries of the global
    state hold, are one parameter, and are shared in the result. Like the store, it may be filled from many threads.

    Args:
        global_state: State that was sent out, ``w``.
        capacity: Largest number of accepted clients in a round.
        layout: Which entries are parameters; by default all floating-point entries without BatchNorm's running
            statistics.
        with_fishers: False for rules that need no Fishers.
        path: Of a file that takes the updates and Fishers; see :class:`UpdateStore`.

    Attributes:
        layout: Of the parameters.
        updates: The store.

    Raises:
        ValueError: the global state lacks parameters of the layout, or has them in another shape.
    """

    def __init__(
        self,
        global_state: State,
        capacity: int,
        *,
        layout: ParamLayout | None = None,
        with_fishers: bool = True,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.layout = parameter_layout(global_state) if layout is None else layout
        self._set_global(global_state)
        self.updates = UpdateStore(
            self.layout.numel,
            capacity,
            self._vector.dtype,
            device=self._vector.device,
            with_fishers=with_fishers,
            layout=self.layout,
            path=path,
        )

    def _set_global(self, global_state: State) -> None:
        vector = self.layout.flatten(global_state)
        self._vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
        self._global = global_state
        self._owners = _owners(global_state, self.layout)
        self._buffers = {k: v for k, v in global_state.items() if k not in self._owners and _is_mean(v)}
        self._received: dict[Hashable, dict[str, Tensor]] = {}

    @property
    def rejected(self) -> dict[Hashable, str]:
        """Reason by client id of those that were not accepted."""
        return self.updates.rejected

    def clear(self, global_state: State) -> None:
        """Forget everything for the next round, which starts from this state of the same layout."""
        self._set_global(global_state)
        self.updates.clear()

    def put(
        self,
        state: State,
        fisher: Any,
        num_samples: Any,
        client_id: Hashable,
        *,
        difference: bool = False,
    ) -> bool:
        """Take in one client's contribution, if it can be used.

        Args:
            state: ``w_k``: tensors or arrays by name.
            fisher: A vector ``[P]`` in the order of the layout, or a mapping by parameter name; None in a store without
                Fishers.
            num_samples: ``n_k``.
            client_id: Its id.
            difference: Whether the entries of ``state`` are differences to those of the global state. Those of
                parameters are then copied straight into the store.

        Returns:
            Whether it was accepted; if not, ``rejected`` tells why.

        Raises:
            RuntimeError: the store is full.
        """
        try:
            buffers = self._read_buffers(state, difference)
            update = state if difference else self._difference(state)
        except Exception as error:  # the state is the client's, and so is whatever it raises
            self.reject(client_id, shown(error, str))
            return False
        accepted = self.updates.put(update, fisher, num_samples, client_id)
        if accepted:
            self._received[client_id] = buffers
        return accepted

    def reject(self, client_id: Hashable, reason: str) -> None:
        """Record that a client has no usable contribution this round; one that was accepted before stays."""
        if client_id not in self.updates:
            self.updates.reject(client_id, reason)

    def aggregate(
        self, rule: AggregationRule, *, on_invalid: OnInvalid = "reject"
    ) -> tuple[dict[str, Any], AggregationResult]:
        """New global state, and what the rule did.

        The state has the keys, order, dtypes and devices of the global one and no memory in common with any input.
        Clients with buffers larger than the rule's ``norm_bound`` times what is usual are rejected.
        """
        for client, reason in self._strange(rule.norm_bound).items():
            self.updates.remove(client)
            self.updates.reject(client, reason)
        result = rule.aggregate(self._vector, self.updates, on_invalid=on_invalid)
        params = self.layout.unflatten(result.params)
        state = self._global
        fresh = {name: params[name].to(state[name].device, state[name].dtype, copy=True) for name in self.layout.names}
        return {name: self._new_entry(name, value, fresh, result) for name, value in state.items()}, result

    def _new_entry(self, name: str, value: Any, fresh: dict[str, Tensor], result: AggregationResult) -> Any:
        if name in self._owners:
            return fresh[self._owners[name]]
        if name in self._buffers:
            return self._weighted_mean(name, value, result)
        return copy.deepcopy(value)

    def _difference(self, state: State) -> dict[str, Tensor]:
        own = self.layout.unflatten(self._vector)
        update = {}
        for name, value in zip(self.layout.names, self.layout.tensors(state), strict=True):
            if value.dtype not in FLOATS:
                raise TypeError(f"parameter {name} must be floating point, got {value.dtype}")
            update[name] = value.to(self._vector.device, self._vector.dtype) - own[name]
        return update

    def _read_buffers(self, state: State, difference: bool) -> dict[str, Tensor]:
        """Copies of the client's buffers, which are small; the state may be freed after that."""
        if not isinstance(state, Mapping):
            raise TypeError(f"expected a state dict, got {type(state).__name__}")
        buffers = {}
        for name, own in self._buffers.items():
            if name not in state:
                raise ValueError(f"missing buffer: {name}")
            value = as_tensor(state[name])
            if value.shape != own.shape:
                raise ValueError(f"buffer {name} has shape {list(value.shape)}, expected {list(own.shape)}")
            value = value.to(own.device, torch.float64, copy=True)
            if not value.isfinite().all():
                raise ValueError(f"buffer {name} is not finite")
            buffers[name] = value + own if difference else value
        return buffers

    def _strange(self, norm_bound: float | None) -> dict[Hashable, str]:
        """Why clients are rejected for their buffers.

        For an entry larger than ``norm_bound`` times the median over the clients of their largest entries, or the
        largest entry of the global buffer if that is more.
        """
        strange: dict[Hashable, str] = {}
        if norm_bound is None:
            return strange
        for name, own in self._buffers.items():
            sizes = {client: _size(b[name]) for client, b in self._received.items() if client not in strange}
            if not sizes:
                break
            usual = max(median_size(torch.tensor(list(sizes.values()), dtype=torch.float64)), _size(own.double()))
            for client, size in sizes.items():
                if size > norm_bound * usual:
                    strange[client] = (
                        f"buffer {name} has an entry of size {size:.4g}, "
                        f"beyond {norm_bound:g} times the usual {usual:.4g}"
                    )
        return strange

    def _weighted_mean(self, name: str, value: Tensor, result: AggregationResult) -> Tensor:
        if not result.kept.any():
            return value.detach().clone()
        mean = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
        for client, weight in zip(result.clients, result.weights.tolist(), strict=True):
            if weight:
                mean += weight * self._received[client][name]
        return (mean if value.is_floating_point() else mean.round()).to(value.dtype)


def floating_layout(global_state: State) -> ParamLayout:
    """All floating-point entries; shared tensors once."""
    first: dict[Hashable, str] = {}
    for name, value in global_state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            first.setdefault(_memory(name, value), name)
    return ParamLayout.from_tensors({name: global_state[name] for name in first.values()})


def parameter_layout(global_state: State) -> ParamLayout:
    """:func:`floating_layout` without BatchNorm's running statistics."""
    names = (name for name in floating_layout(global_state).names if not name.endswith(_BATCH_NORM_STATISTICS))
    return ParamLayout.from_tensors({name: global_state[name] for name in names})


def _owners(global_state: State, layout: ParamLayout) -> dict[str, str]:
    """The parameter behind every entry that is one, under its own name or another."""
    owner = {_memory(name, global_state[name]): name for name in layout.names}
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


def _size(value: Tensor) -> float:
    """The largest absolute entry."""
    return value.abs().max().item() if value.numel() else 0.0
