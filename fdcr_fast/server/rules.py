"""Aggregation rules: from one round of client updates to the new global parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, overload

import torch
from torch import Tensor

from fdcr_fast.server import passes
from fdcr_fast.server.intake import ClientUpdates, OnInvalid, refuse, sample_shares
from fdcr_fast.server.sharded import ParamShard
from fdcr_fast.server.shares import limited_shares
from fdcr_fast.server.store import UpdateStore
from fdcr_fast.server.tiles import check_device, check_floating
from fdcr_fast.server.transfer import fetch


@dataclass(frozen=True)
class AggregationResult:
    """New global parameters, and what became of every client.

    Rows are the ``K`` clients of the matrices, or those that a store accepted. Vectors over clients lie on
    the CPU.

    Attributes:
        params: ``[P]``, dtype and device of the global parameters; with a shard, those of the shard.
        weights: Weight of each client in the mean, float64 ``[K]``; 0 for those dropped or rejected.
        discrepancy: ``V_k``, float64 ``[K]``; NaN for rejected clients and under rules that compute none.
        kept: bool ``[K]``, who was aggregated.
        labels: Cluster of each client by ascending mean discrepancy, int64 ``[K]``; -1 for rejected clients.
        clients: ``K`` client ids.
        rejected: Reason by client id of the clients whose contribution could not be used.
        explanation: What the rule says about each client, by client id; empty under rules that say nothing.
    """

    params: Tensor
    weights: Tensor
    discrepancy: Tensor
    kept: Tensor
    labels: Tensor
    clients: tuple[Hashable, ...]
    rejected: dict[Hashable, str]
    explanation: Mapping[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """What a rule decides about a round; rows of rejected clients are ignored.

    Attributes:
        kept: bool ``[K]``.
        discrepancy: ``V_k [K]``, or None where the rule has no such score.
        labels: int64 ``[K]``, or None for 0 where kept and 1 where dropped.
        weights: Of each client in the mean, float64 ``[K]``; None for shares of the samples.
        explanation: What else there is to say about each client, by client id.
    """

    kept: Tensor
    discrepancy: Tensor | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    explanation: Mapping[Hashable, Any] = field(default_factory=dict)


# What a rule decides, the weights of the clients, and the new parameters.
Outcome: TypeAlias = tuple[Selection, Tensor, Tensor]


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
        sharded: Whether the rule takes a shard. Whatever such a rule computes from more than one parameter goes through
            the methods of ``clients`` and ``clients.shard``, or through functions that do.
    """

    sharded: ClassVar[bool] = False
    norm_bound: float | None = None
    max_weight_share: float | None = None
    rescale: bool = False
    importance: bool = False

    def _check_options(self) -> None:
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
        single = passes.fits_single(clients)
        return passes.mean(global_params, clients, weights, rescale=self.rescale, single=single)

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

    @overload
    def aggregate(
        self,
        global_params: Tensor,
        updates: UpdateStore,
        *,
        on_invalid: OnInvalid = "reject",
        shard: ParamShard | None = None,
    ) -> AggregationResult: ...

    @overload
    def aggregate(
        self,
        global_params: Tensor,
        updates: Tensor,
        fishers: Tensor | None,
        num_samples: Any,
        *,
        client_ids: Sequence[Hashable] | None = None,
        on_invalid: OnInvalid = "reject",
        shard: ParamShard | None = None,
    ) -> AggregationResult: ...

    def aggregate(
        self,
        global_params: Tensor,
        updates: Tensor | UpdateStore,
        fishers: Tensor | None = None,
        num_samples: Any = None,
        *,
        client_ids: Sequence[Hashable] | None = None,
        on_invalid: OnInvalid = "reject",
        shard: ParamShard | None = None,
    ) -> AggregationResult:
        """New global parameters ``w' = w + sum_k alpha^_k c_k delta_k`` over the kept clients (Algorithm 1).

        ``alpha^_k = n_k / sum n`` over the kept clients (eq. 11); ``c_k = 2 sigmoid(I_k)`` (eq. 12), or 1
        without rescaling. Where nobody is kept, ``w' = w``.

        Args:
            global_params: ``w [P]``, any floating dtype.
            updates: ``delta_k = w_k - w`` in the rows of ``[K, P]`` (any strides, never copied), or a store,
                which holds all the rest as well.
            fishers: ``F_k`` in the rows of ``[K, P]``; not read, and may be None, if the rule takes no
                importances.
            num_samples: ``n_k [K]``, numbers.
            client_ids: ``K`` different ids, by default 0 to K - 1.
            on_invalid: What becomes of a round with clients whose contribution cannot be used: ``"reject"``
                aggregates the others, ``"raise"`` raises ValueError naming client and reason.
            shard: Which parameters the global parameters and the updates are; by default all of them. All processes of
                the shard's group must call alike, and get the same but for the parameters; see
                :class:`fdcr_fast.ParamShard`.

        Raises:
            TypeError: a matrix is not a floating-point tensor, sample counts are not numbers, or the rule takes no
                shard.
            RuntimeError: another process of the group died or did not arrive in time, or decided differently.
            ValueError: shapes or devices do not fit, the global parameters are not finite, there are no
                clients, or Fishers are missing. What is wrong with one client alone rejects that client
                instead.
        """

        finite: Tensor | None = None

        def take_in() -> ClientUpdates:
            nonlocal finite
            clients = self._intake(updates, fishers, num_samples, client_ids)
            finite = _check_global(global_params, clients)
            if shard is not None:
                require_finite(finite)
            if shard is not None and not self.sharded:
                raise TypeError(f"{type(self).__name__} needs all parameters in one process: it takes no shard")
            return clients

        if shard is None:
            clients = take_in()
        else:
            dtype = getattr(global_params, "dtype", None)
            stored = not isinstance(updates, Tensor)
            clients = shard.agreed(take_in, stored=stored, rule=self, on_invalid=on_invalid, dtype=dtype)
        foreseen = None
        if isinstance(updates, Tensor):
            clients, foreseen = self._read_norms(global_params.detach(), clients, finite)
            finite = None
        elif shard is not None and self.needs_norms:
            clients = clients.with_norms(passes.squared_norms(clients)).fetched()
        clients = clients.screened(importance=self.needs_fishers, norm_bound=self.norm_bound)
        refuse(clients.rejected, on_invalid)
        valid, rows = clients.valid, len(clients.clients)
        if foreseen is not None and valid.all():
            selection, weights, params = foreseen
        elif valid.any():
            selection, weights, params = self._apply(global_params.detach(), clients, finite)
        else:
            require_finite(finite)
            selection, weights, params = Selection(valid), torch.zeros(rows, dtype=torch.float64), global_params
        if shard is not None:
            shard.confirm(weights)
        kept = selection.kept & valid
        labels = (~kept).long() if selection.labels is None else selection.labels
        scores = torch.full((rows,), torch.nan, dtype=torch.float64)
        if selection.discrepancy is not None:
            scores = torch.where(valid, selection.discrepancy, scores)
        return AggregationResult(
            params=params if weights.any() else global_params.detach().clone(),
            weights=weights,
            discrepancy=scores,
            kept=kept,
            labels=torch.where(valid, labels, -1),
            clients=clients.clients,
            rejected=clients.rejected,
            explanation=selection.explanation,
        )

    def shares(self, clients: ClientUpdates, chosen: Tensor) -> Tensor:
        """``n_k / sum n`` over the chosen clients, none above ``max_weight_share``, 0 for the others (eq. 11)."""
        return limited_shares(sample_shares(clients.num_samples, chosen), self.max_weight_share)

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """Weight of each client in the mean, float64 ``[K]``, 0 for those that are not kept."""
        return self.shares(clients, kept)

    def _apply(self, global_params: Tensor, clients: ClientUpdates, finite: Tensor | None) -> Outcome:
        """What the rule decides about a round with valid clients, their weights, and the new parameters.

        Checks whether the global parameters are ``finite``, if that is not known yet.
        """
        require_finite(finite)
        selection = self.judge(global_params, clients)
        kept = selection.kept & clients.valid
        given = selection.weights
        weights = self.weights(clients, kept) if given is None else torch.where(kept, given, 0.0)
        return selection, weights, self.combine(global_params, clients, weights) if weights.any() else global_params

    @property
    def needs_fishers(self) -> bool:
        """Whether the rule takes importances anywhere."""
        return self.importance or self.rescale

    @property
    def needs_norms(self) -> bool:
        """Whether norms enter the result, and are not only compared: shards then sum them in a fixed order."""
        return False

    def _intake(
        self,
        updates: Tensor | UpdateStore,
        fishers: Tensor | None,
        num_samples: Any,
        client_ids: Sequence[Hashable] | None,
    ) -> ClientUpdates:
        """The round; that of matrices without norms."""
        if isinstance(updates, UpdateStore):
            if fishers is not None or num_samples is not None or client_ids is not None:
                raise TypeError("a store holds fishers, num_samples and client ids: give the store alone")
            clients = updates.client_updates()
            if not clients.clients and not clients.rejected:
                raise ValueError("expected at least one client, got an empty store")
        else:
            clients = ClientUpdates.from_matrices(
                updates, fishers if self.needs_fishers else None, num_samples, client_ids, read_norms=False
            )
        if self.needs_fishers and not clients.tiles.with_fishers:
            raise ValueError(f"{self!r} takes importances: fishers must be given")
        return clients

    def _read_norms(
        self, _global_params: Tensor, clients: ClientUpdates, finite: Tensor | None
    ) -> tuple[ClientUpdates, Outcome | None]:
        """The round with statistics of its rows, and where one reading gives it the outcome if nobody is rejected.

        Also checks whether the global parameters are ``finite``.
        """
        clients = clients.with_norms(passes.squared_norms(clients))
        *statistics, finite = fetch([*clients.statistics, finite])
        require_finite(finite)
        return clients.with_statistics(*statistics), None


def _check_global(global_params: Tensor, clients: ClientUpdates) -> Tensor | None:
    """Raise unless these can be the parameters of the round.

    Returns:
        None if they are finite; on a device, where that would have to be waited for, whether they are.
    """
    check_floating("global_params", global_params, "[P]")
    if global_params.numel() != clients.num_params:
        raise ValueError(
            f"expected global_params [{clients.num_params}] like the updates, got [{global_params.numel()}]"
        )
    check_device("global_params", global_params, clients.tiles)
    finite = torch.stack(global_params.detach().aminmax()).isfinite().all()
    if finite.device.type != "cpu":
        return finite
    require_finite(finite)
    return None


def require_finite(finite: Tensor | None) -> None:
    """Raise unless the global parameters are finite, or known to be."""
    if finite is not None and not finite:
        raise ValueError("global_params are not finite")
