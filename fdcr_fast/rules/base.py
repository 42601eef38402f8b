"""Aggregation rules: from one round of client updates to the new global parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdcr_fast.distributed.param_shard import ParamShard
from fdcr_fast.round import readings
from fdcr_fast.round.arguments import check_floating, require_finite
from fdcr_fast.round.client_updates import ClientUpdates, refuse_empty
from fdcr_fast.round.screening import OnEmpty, OnInvalid, refuse
from fdcr_fast.round.shard import WHOLE
from fdcr_fast.round.shares import limited_shares, sample_shares
from fdcr_fast.round.vectors import sent
from fdcr_fast.rules.intake import check_global, stored_vectors, warn_of_states
from fdcr_fast.rules.options import check_types
from fdcr_fast.rules.result import (
    AggregationResult,
    Outcome,
    Selection,
    check_decision,
    check_weights,
    result_of,
)
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.store.update_store import UpdateStore
from fdcr_fast.store.upload import argument, matrix


class AggregationRule:
    """A rule decides who is kept (:meth:`select`); validation, weights and weighted mean are common to all.

    Most rules say no more than :meth:`select`; some look at the global parameters as well (:meth:`judge`), and some
    combine the kept updates otherwise than by a weighted mean (:meth:`combine`).

    Attributes:
        norm_bound: Clients with an update norm beyond this multiple of the median norm are rejected; None for
            no bound.
        max_weight_share: Largest share of one client in the sums over clients; None for no limit.
        rescale: Whether kept updates are rescaled by ``2 sigmoid(I_k)`` (eq. 12).
        importance: Whether :meth:`select` reads importances.
        weighs_samples: Whether sample counts matter; where not they may be left out.
        sharded: Whether the rule takes a shard. Whatever such a rule computes from more than one parameter goes through
            the methods of ``clients`` and ``clients.shard``, or through functions that do.
        needs_server_data: Whether the rule is made with data of the server.
    """

    weighs_samples: ClassVar[bool] = True
    sharded: ClassVar[bool] = False
    needs_server_data: ClassVar[bool] = False
    norm_bound: float | None = None
    max_weight_share: float | None = None
    rescale: bool = False
    importance: bool = False

    @classmethod
    def from_options(cls, options: ServerOptions) -> AggregationRule:
        """The rule of a server that knows ``options``; here one that needs none of them."""
        return cls()

    @classmethod
    def min_clients(cls, num_byzantine: int) -> int:
        """Fewest clients of a round in which so many may be Byzantine; 1 for a rule that assumes nothing of them."""
        return 1

    def _check_options(self) -> None:
        check_types(self)
        if self.norm_bound is not None and not self.norm_bound >= 1:
            raise ValueError(f"norm_bound must be None or at least 1 (the median client itself), got {self.norm_bound}")
        if self.max_weight_share is not None and not 0 < self.max_weight_share <= 1:
            raise ValueError(f"max_weight_share must be None or in (0, 1], got {self.max_weight_share}")

    def select(self, clients: ClientUpdates) -> Selection:
        """Decide who is kept, from nothing but the uploads of a round with a valid client; here everybody."""
        return Selection(clients.valid)

    def judge(self, global_params: Tensor, clients: ClientUpdates) -> Selection:
        """:meth:`select` for rules that also look at the parameters ``w`` that the clients started from."""
        return self.select(clients)

    def combine(self, global_params: Tensor, clients: ClientUpdates, weights: Tensor) -> Tensor:
        """New global parameters from the clients whose weight is not 0, of which there is at least one."""
        single = readings.fits_single(clients)
        on = clients.on_device()
        weights = sent(weights, on.tiles.device)
        return readings.mean(global_params, on, weights, rescale=self.rescale, single=single)

    def set_scores(self, clients: Sequence[Any]) -> Callable[[Tensor], Tensor] | None:
        """How the rule judges sets of clients after a round, for those who study it; here None: it judges no sets.

        Args:
            clients: Ids of the round's valid clients, ``K`` of them.

        Returns:
            A function from membership, bool ``[R, K]``, to scores, float64 ``[R]``: the larger, the more it looks as if
            the set were the attackers.
        """
        return None

    def shares(self, clients: ClientUpdates, chosen: Tensor) -> Tensor:
        """``n_k / sum n`` over the chosen clients, none above ``max_weight_share``, 0 for the others (eq. 11)."""
        return limited_shares(sample_shares(clients.num_samples, chosen), self.max_weight_share)

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """Weight of each client in the mean, float64 ``[K]``, 0 for those that are not kept."""
        return self.shares(clients, kept)

    def buffer_trim(self, kept: int) -> int | None:
        """How many of the smallest and of the largest values of so many kept clients no buffer may lie beyond.

        Buffers of states are no parameters, and no rule decides about them; see :class:`fdcr_fast.StateStore`. Here a
        quarter, and at least one if there are three; None makes them plain means.
        """
        return min(max(1, kept // 4), (kept - 1) // 2)

    def reset(self) -> None:
        """Forget earlier rounds, as before another experiment; rules that remember nothing have nothing to forget."""

    def memory(self) -> bytes:
        """What the rule remembers of earlier rounds; empty for one that remembers nothing. Never a pickle."""
        return b""

    def with_memory(self, memory: bytes) -> AggregationRule:
        """The rule with what another one remembered.

        Raises:
            ValueError: it is no memory of such a rule.
        """
        if memory:
            raise ValueError(f"{type(self).__name__} remembers nothing, and was given {len(memory)} bytes of memory")
        return self

    @property
    def needs_fishers(self) -> bool:
        """Whether the rule takes importances anywhere."""
        return self.importance or self.rescale

    @property
    def needs_norms(self) -> bool:
        """Whether norms enter the result, and are not only compared: shards then sum them in a fixed order."""
        return False

    def needed(self, fishers: Any, num_samples: Any, count: int) -> tuple[Any, Any]:
        """The Fishers and sample counts of so many clients as far as the rule takes them: else None, and one each.

        Raises:
            ValueError: Fishers are missing.
            TypeError: sample counts are missing.
        """
        if self.needs_fishers and fishers is None:
            raise ValueError(f"{type(self).__name__} takes importances: fishers must be given, [K, P]")
        if self.weighs_samples and num_samples is None:
            raise TypeError(
                f"expected num_samples to be {count} numbers, got None: {type(self).__name__} weighs by them"
            )
        return (fishers if self.needs_fishers else None), ([1] * count if num_samples is None else num_samples)

    @overload
    def aggregate(
        self,
        global_params: Tensor | NDArray[Any],
        updates: UpdateStore,
        *,
        on_invalid: OnInvalid = "reject",
        on_empty: OnEmpty = "raise",
        shard: ParamShard | None = None,
    ) -> AggregationResult: ...

    @overload
    def aggregate(
        self,
        global_params: Tensor | NDArray[Any],
        updates: Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]],
        fishers: Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]] | None = None,
        num_samples: Any = None,
        *,
        client_ids: Sequence[Hashable] | None = None,
        on_invalid: OnInvalid = "reject",
        on_empty: OnEmpty = "raise",
        shard: ParamShard | None = None,
    ) -> AggregationResult: ...

    def aggregate(
        self,
        global_params: Any,
        updates: Any,
        fishers: Any = None,
        num_samples: Any = None,
        *,
        client_ids: Sequence[Hashable] | None = None,
        on_invalid: OnInvalid = "reject",
        on_empty: OnEmpty = "raise",
        shard: ParamShard | None = None,
    ) -> AggregationResult:
        """New global parameters ``w' = w + sum_k alpha^_k c_k delta_k`` over the kept clients (Algorithm 1).

        ``alpha^_k = n_k / sum n`` over the kept clients (eq. 11); ``c_k = 2 sigmoid(I_k)`` (eq. 12), or 1
        without rescaling. Where nobody is kept, ``w' = w``.

        Args:
            global_params: ``w [P]``, any floating dtype, a tensor or an array.
            updates: ``delta_k = w_k - w`` in the rows of ``[K, P]`` (a tensor or an array of any strides, never
                copied), or ``K`` vectors in a list, which are, or a store, which holds all the rest as well. The round
                of a store ends here: the next contribution begins another one.
            fishers: ``F_k`` in any form that the updates may have but a store; not read, and may be None, if the rule
                takes no importances.
            num_samples: ``n_k [K]``, numbers; may be None if the rule does not weigh by them.
            client_ids: ``K`` different ids, by default 0 to K - 1.
            on_invalid: What becomes of a round with clients whose contribution cannot be used: ``"reject"``
                aggregates the others, ``"raise"`` raises ValueError naming client and reason.
            on_empty: What becomes of a round in which no client's contribution can be used: ``"raise"`` raises
                ValueError with the first reasons, ``"keep"`` warns, and ``w' = w``. That is also so of tensors where
                all sample counts are zero.
            shard: Which parameters the global parameters and the updates are; by default all of them. All processes of
                the shard's group must call alike, and get the same but for the parameters; see
                :class:`fdcr_fast.ParamShard`.

        Raises:
            TypeError: a matrix is not of floating point, sample counts are not numbers, or the rule takes no shard.
            RuntimeError: another process of the group died or did not arrive in time, or decided differently.
            ValueError: shapes or devices do not fit, the global parameters are not finite, there are no
                clients, none that can be used, or Fishers are missing. What is wrong with one client alone rejects
                that client instead.
        """
        if shard is not None and not isinstance(shard, ParamShard):
            raise TypeError(f"expected shard to be a ParamShard, got {shard!r}")
        if isinstance(global_params, np.ndarray):
            global_params = argument("global_params", global_params)
        stored = isinstance(updates, UpdateStore)
        take_in = partial(self._take_in, global_params, updates, fishers, num_samples, client_ids, shard)
        if shard is None:
            clients = take_in()
        else:
            dtype = getattr(global_params, "dtype", None)
            clients = shard.agreed(
                take_in, stored=stored, rule=self, on_invalid=on_invalid, on_empty=on_empty, dtype=dtype
            )
        global_params = global_params.detach()

        # With norms that enter the result shards take them again: their sum is to have the same bits for any shards.
        if clients.unread or (clients.shard is not WHOLE and self.needs_norms):
            clients = self._measured(global_params, clients)
        clients = clients.screened(importance=self.needs_fishers, norm_bound=self.norm_bound)
        refuse(clients.rejected, on_invalid)
        refuse_empty(clients, on_empty)

        if clients.num_valid:
            selection, weights, params = self._outcome(global_params, clients)
        else:
            selection, weights, params = nothing_changes(global_params, clients)
        check_weights(self, weights)

        if shard is None:
            warn_of_states(global_params, clients)
        else:
            shard.confirm(weights)
        if stored:
            updates.end_round(clients.clients)
        return result_of(clients, selection, weights, params if weights.numpy().any() else global_params.clone())

    def _take_in(
        self,
        global_params: Tensor,
        updates: Any,
        fishers: Any,
        num_samples: Any,
        client_ids: Sequence[Hashable] | None,
        shard: ParamShard | None,
    ) -> ClientUpdates:
        """The round as it came, with valid arguments; of a shard what is here, and what the ranks tell each other."""
        check_floating("global_params", global_params, "[P]")
        clients = self._round(global_params, updates, fishers, num_samples, client_ids)
        finite = check_global(global_params, clients)
        if finite is not None:
            clients = clients.but(finite=finite)
        if shard is None:
            return clients
        require_finite(clients.finite)
        if clients.unread and isinstance(updates, UpdateStore):
            clients = readings.measured(clients)
        if not self.sharded:
            raise TypeError(f"{type(self).__name__} needs all parameters in one process: it takes no shard")
        return clients

    def _round(
        self,
        global_params: Tensor,
        updates: Any,
        fishers: Any,
        num_samples: Any,
        client_ids: Sequence[Hashable] | None,
    ) -> ClientUpdates:
        """The round; that of matrices without norms."""
        if isinstance(updates, UpdateStore):
            if fishers is not None or num_samples is not None or client_ids is not None:
                raise TypeError("a store holds fishers, num_samples and client ids: give the store alone")
            clients = updates.client_updates()
            if self.needs_fishers and not clients.tiles.with_fishers:
                raise ValueError(
                    f"{type(self).__name__} takes importances: fishers must be given, and the store keeps none "
                    "(make it with with_fishers=True)"
                )
            return clients
        if not isinstance(updates, Tensor | np.ndarray | list | tuple):
            raise TypeError(
                f"expected updates [K, P], K vectors or an UpdateStore, got {type(updates).__name__}"
                + (" (its aggregate(rule) takes the rule)" if hasattr(updates, "put_state") else "")
            )
        if not self.needs_fishers and self.weighs_samples and num_samples is None and np.ndim(fishers) == 1:
            raise TypeError("fishers are [K, P], got [K]: sample counts are the next argument, num_samples=")
        fishers, num_samples = self.needed(fishers, num_samples, len(updates))
        if isinstance(updates, list | tuple):
            return stored_vectors(global_params, updates, fishers, num_samples, client_ids).client_updates()
        return ClientUpdates.from_matrices(
            argument("updates", updates),
            None if fishers is None else matrix("fishers", fishers),
            num_samples,
            client_ids,
        )

    def _measured(self, global_params: Tensor, clients: ClientUpdates) -> ClientUpdates:
        """The round with the statistics that it is screened by, from a reading of its parameters."""
        return readings.measured(clients)

    def _outcome(self, global_params: Tensor, clients: ClientUpdates) -> Outcome:
        """What the rule decides about a round with valid clients, their weights, and the new parameters.

        These are the global ones themselves where nobody counts.
        """
        require_finite(clients.finite)
        selection = self.judge(global_params, clients)
        check_decision(self, selection, len(clients.clients))
        kept = selection.kept & clients.valid
        given = selection.weights
        weights = self.weights(clients, kept) if given is None else torch.where(kept, given, 0.0)
        return selection, weights, self.combine(global_params, clients, weights) if weights.any() else global_params


def nothing_changes(global_params: Tensor, clients: ClientUpdates) -> Outcome:
    """The outcome of a round in which no client's contribution can be used."""
    require_finite(clients.finite)
    return Selection(clients.valid), torch.zeros(len(clients.clients), dtype=torch.float64), global_params


def as_rule(rule: Any) -> AggregationRule:
    """The rule, or TypeError for anything else, such as a rule's name or class."""
    if not isinstance(rule, AggregationRule):
        raise TypeError(f"expected rule to be an AggregationRule, such as FedAvg(), got {rule!r}")
    return rule
