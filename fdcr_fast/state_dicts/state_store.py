"""The clients' state dicts of one round, taken in as they arrive: parameters into a store, buffers beside it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout, by_plain_name
from fdcr_fast.round.arguments import plain_id
from fdcr_fast.round.screening import OnEmpty, OnInvalid
from fdcr_fast.rules.base import AggregationRule, as_rule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.state_dicts.buffers import Buffers
from fdcr_fast.state_dicts.entries import (
    BATCH_NORM_STATISTICS,
    State,
    as_entry,
    copied,
    entries_of,
    entry_like,
    is_real,
    known_ties,
    layout_of,
    same_values,
)
from fdcr_fast.store.update_store import UpdateStore
from fdcr_fast.store.upload import shown, vector_pieces


@dataclass(frozen=True)
class _Received:
    """What a client sent besides parameters: the buffers that it changed, and which entries equal which parameters."""

    buffers: dict[str, Tensor]
    ties: frozenset[tuple[str, str]]


class StateStore:
    """An :class:`UpdateStore` for servers that receive whole states, one client after the other.

    Parameters go into the store as updates ``w_k - w``. A buffer becomes the mean over the clients that the rule kept,
    with its weights, of each entry held between the quartiles of their values (see
    :meth:`AggregationRule.buffer_trim`): no client moves it far, whatever it sends or claims to weigh, and under
    :class:`FedAvg` without bounds it is the plain mean. Integer buffers (``num_batches_tracked``) are rounded; what is
    no real number stays as in the global state, and so does everything if nobody is kept.

    Tensors under several names are one parameter, and are shared in the result: those that are one memory in the global
    state, those that the layout knows as tied, and, since copies of a state lose that, an entry that equals a parameter
    in the global state and in those of most clients.

    Names may have the prefixes of wrappers (``module.``, ``_orig_mod.``). ``aggregate`` ends the round: before
    :meth:`clear` nothing more is taken in. Like the store, it may be filled from many threads.

    Args:
        global_state: State that was sent out, ``w``: a state dict of tensors or arrays, or a module. It is copied, so
            that clients may be trained in the same module.
        capacity: Largest number of accepted clients in a round.
        layout: Entries that are parameters; by default all floating-point entries without BatchNorm's running
            statistics, of a module its parameters.
        with_fishers: False for rules that need no Fishers.
        path: Path of a file that takes the updates and Fishers; see :class:`UpdateStore`.
        copy: False where the states stay in memory and do not change until they are aggregated; see
            :class:`UpdateStore`. Buffers are copied all the same.

    Attributes:
        layout: Layout of the parameters.
        updates: The store of the parameters.

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
        copy: bool = True,
    ) -> None:
        if layout is None:
            layout = layout_of(global_state)
        self.layout = layout
        self._set_global(global_state)
        self.updates = UpdateStore(
            self.layout.numel,
            capacity,
            self._vector.dtype,
            device=self._vector.device,
            with_fishers=with_fishers,
            layout=self.layout,
            path=path,
            copy=copy,
            cleared=True,
        )

    def _set_global(self, global_state: State) -> None:
        """Entries are known by their plain names from here on, parameters by those in the layout.

        What is no parameter is copied too: a model goes on changing, as where clients are trained in it one by one.
        """
        entries = entries_of(global_state)
        names = by_plain_name({name: name for name in entries})
        own = {plain: as_entry(entries[name]) for plain, name in names.items()}
        plain_layout = by_plain_name({name: name for name in self.layout.names})
        params = {plain: plain_layout[plain] for plain in own if plain in plain_layout}
        vector = self.layout.flatten(own)
        owners = {**params, **known_ties(own, params, by_plain_name(dict(self.layout.tied)))}
        taken = {name: entries[name] if plain in owners else copied(entries[name]) for plain, name in names.items()}
        others = {plain: as_entry(taken[name]) for plain, name in names.items() if plain not in owners}
        rest = {plain: value for plain, value in others.items() if is_real(value)}
        maybe_tied = _possible_ties({name: own[name] for name in params}, rest)
        # All that can fail is behind us: nothing is changed unless everything is.
        self._vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
        self._plain = {name: plain for plain, name in names.items()}
        self._owners, self._global, self._buffers, self._maybe_tied = owners, taken, Buffers(rest), maybe_tied
        self._received: dict[Hashable, _Received] = {}

    def __repr__(self) -> str:
        return f"StateStore of {len(self.layout.names)} parameters: {self.updates!r}"

    @property
    def rejected(self) -> dict[Hashable, str]:
        """Reason by client id of those that were not accepted."""
        return self.updates.rejected

    def clear(self, global_state: State) -> None:
        """Forget everything for the next round, which starts from this state of the same layout."""
        self._set_global(global_state)
        self.updates.clear()

    def put_state(self, state: Any, fisher: Any, num_samples: Any, client_id: Hashable) -> bool:
        """Take in one client's state ``w_k``, if it can be used.

        Args:
            state: Tensors or arrays by name, a module, a vector ``[P]`` or a sequence of the parameters in the order of
                the layout. The last two leave buffers as they are in the global state.
            fisher: A vector ``[P]`` or a sequence in the order of the layout, or a mapping by parameter name; None in a
                store without Fishers.
            num_samples: ``n_k``.
            client_id: Its id.

        Returns:
            Whether it was accepted; if not, ``rejected`` tells why.

        Raises:
            RuntimeError: the store is full, or the round was aggregated.
            TypeError: the id cannot be one.
        """
        return self.put(state, fisher, num_samples, client_id)

    def put_update(self, update: Any, fisher: Any, num_samples: Any, client_id: Hashable) -> bool:
        """Take in what one client changed, ``w_k - w``; parameters are copied straight into the store.

        All else is as for :meth:`put_state`, but that a module is no update. Buffers that it lacks stay as they are in
        the global state.
        """
        return self.put(update, fisher, num_samples, client_id, difference=True)

    def put(self, state: Any, fisher: Any, num_samples: Any, client_id: Hashable, *, difference: bool = False) -> bool:
        """:meth:`put_state`, or with ``difference`` :meth:`put_update`."""
        client_id = self._in_this_round(client_id)
        try:
            named, whole = self._named(state, difference)
            received = self._received_from(named, difference, whole)
            fisher = self._with_twins(fisher, named)
        except Exception as error:  # the state is the client's, and so is whatever it raises
            self.reject(client_id, shown(error, str))
            return False
        # Whoever aggregates meanwhile must find it as soon as the client is accepted.
        first = self._received.setdefault(client_id, received)
        accepted = self.updates.put(named, fisher, num_samples, client_id, base=None if difference else self._vector)
        if accepted:
            self._received[client_id] = received
        elif first is received and client_id not in self.updates:
            self._received.pop(client_id, None)
        return accepted

    def reject(self, client_id: Hashable, reason: str) -> None:
        """Record that a client has no usable contribution this round; one that was accepted before stays.

        Raises:
            RuntimeError: the round was aggregated.
        """
        client_id = self._in_this_round(client_id)
        if client_id not in self.updates:
            self.updates.reject(client_id, reason)

    def aggregate(
        self, rule: AggregationRule, *, on_invalid: OnInvalid = "reject", on_empty: OnEmpty = "raise"
    ) -> tuple[dict[str, Any], AggregationResult]:
        """New global state, and what the rule did; see :meth:`AggregationRule.aggregate`.

        The state has the keys, order, types, dtypes and devices of the global one and no memory in common with any
        input.
        """
        result = as_rule(rule).aggregate(self._vector, self.updates, on_invalid=on_invalid, on_empty=on_empty)
        params = self.layout.unflatten(result.params)
        owners = {**self._owners, **self._ties_of_most(set(result.clients) - result.rejected.keys())}
        counting = result.weights.nonzero().flatten()
        clients = [result.clients[k] for k in counting.tolist()]
        weights, trim = result.weights[counting], rule.buffer_trim(len(clients)) if clients else None
        new: dict[str, Any] = {}
        for name, value in self._global.items():
            plain = self._plain[name]
            if plain in owners:
                first = new.get(owners[plain])
                new[owners[plain]] = entry_like(value, params[owners[plain]]) if first is None else first
            elif plain in self._buffers.own and clients:
                changed = [self._changed(client, plain) for client in clients]
                new[plain] = entry_like(value, self._buffers.combined(plain, changed, weights, trim))
            else:
                new[plain] = copied(value)
        return {name: new[owners.get(plain, plain)] for name, plain in self._plain.items()}, result

    def _in_this_round(self, client_id: Hashable) -> Hashable:
        """The id by which the store knows a client; its round must not have ended, which the store itself minds too."""
        if self.updates.aggregated:
            raise RuntimeError(
                "the round was aggregated: clear(state) begins the next one, from the state that was sent out for it"
            )
        return plain_id(client_id)

    def _named(self, state: Any, difference: bool) -> tuple[Mapping[str, Any], bool]:
        """A client's entries by plain name, and whether they ought to be all of them."""
        if difference and isinstance(state, nn.Module):
            raise TypeError("a module is a state and no update: use put_state")
        if isinstance(state, Mapping | nn.Module):
            entries = entries_of(state)
            known = all(name in entries for name in self._plain.values())
            return entries if known else by_plain_name(entries), not difference
        if isinstance(state, Tensor | np.ndarray):
            name = "update" if difference else "state"
            (vector,) = vector_pieces(name, state, self.layout.numel, None, self._vector.dtype)
            pieces = list(self.layout.unflatten(vector).values())
        elif isinstance(state, list | tuple):
            pieces = self.layout.tensors(state)
        else:
            raise TypeError(f"expected a state dict, a module or a vector, got {type(state).__name__}")
        return by_plain_name(dict(zip(self.layout.names, pieces, strict=True))), False

    def _received_from(self, state: Mapping[str, Any], difference: bool, whole: bool) -> _Received:
        """Copies of the client's buffers, which are small; the state may be freed after that."""
        pairs = ((name, owner) for name, owners in self._maybe_tied.items() for owner in owners)
        ties = frozenset((name, owner) for name, owner in pairs if same_values(state.get(name), state.get(owner)))
        tied = {name for name, _ in ties}
        buffers: dict[str, Tensor] = {}
        for name in self._buffers.own:
            if name not in state:
                if whole:
                    raise ValueError(f"missing buffer: {name}")
            elif name not in tied:
                value = self._buffers.read(name, state[name], difference=difference)
                if value is not None:
                    buffers[name] = value
        return _Received(buffers, ties)

    def _with_twins(self, fisher: Any, state: Mapping[str, Any]) -> Any:
        """A Fisher by name in which a parameter that is another one by a second name has that one's."""
        if not isinstance(fisher, Mapping) or all(name in fisher for name in self.layout.names):
            return fisher
        plain = by_plain_name(fisher)
        found = {
            name: plain[twin]
            for name, twins in self._maybe_tied.items()
            for twin in twins
            if name not in plain and twin in plain and same_values(state.get(name), state.get(twin))
        }
        return {**plain, **found}

    def _ties_of_most(self, clients: Collection[Hashable]) -> dict[str, str]:
        """Entries that equal an earlier parameter in the states of most of these, with its name in the layout."""
        received = [self._received[client] for client in clients]
        counts = Counter(tie for client in received for tie in client.ties)
        ties = {}
        for name, owners in self._maybe_tied.items():
            first = next((owner for owner in owners if 2 * counts[name, owner] > len(received)), None)
            if first is not None:
                ties[name] = self._owners[first]
        return ties

    def _changed(self, client: Hashable, name: str) -> Tensor | None:
        """A client's buffer, where it was not kept because it equals a parameter, from the store."""
        received = self._received[client]
        for owner in (owner for tied, owner in received.ties if tied == name):
            part = self.layout.slices[self._owners[owner]]
            value = (self._vector + self.updates[client].update)[part]
            return value.view(self._buffers.own[name].shape).to(self._buffers.own[name])
        return received.buffers.get(name)


def _possible_ties(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The earlier parameters whose values in the global state an entry has, which may be tied to one of them."""
    earlier: defaultdict[torch.Size, list[str]] = defaultdict(list)
    found = {}
    for name, value in {**params, **buffers}.items():
        alike = earlier[value.shape]
        if value.is_floating_point() and value.numel() and not name.endswith(BATCH_NORM_STATISTICS):
            twins = tuple(other for other in alike if same_values(value, params[other]))
            if twins:
                found[name] = twins
        if name in params:
            alike.append(name)
    return found
