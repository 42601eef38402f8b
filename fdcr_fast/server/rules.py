"""Aggregation rules: from one round of client updates to the new global parameters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias, cast, overload

import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.server import passes
from fdcr_fast.server.cluster import CLUSTERINGS, check_density, check_partition
from fdcr_fast.server.intake import (
    ClientUpdates,
    OnInvalid,
    check_device,
    check_floating,
    refuse,
    sample_shares,
)
from fdcr_fast.server.scores import SCORES
from fdcr_fast.server.sharded import ParamShard
from fdcr_fast.server.shares import limited_shares
from fdcr_fast.server.store import UpdateStore
from fdcr_fast.server.transfer import fetch, sent

_ROUNDING = 1e-9  # scores that differ by less, such as those of two clients of equal size, are the same score
_NORM_MARGIN = 1e-4  # norms from float32 products are right to much less


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
                _require_finite(finite)
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
            _require_finite(finite)
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
        _require_finite(finite)
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
        _require_finite(finite)
        return clients.with_statistics(*statistics), None


@dataclass(frozen=True, kw_only=True)
class FedAvg(AggregationRule):
    """The plain sample-weighted mean ``w' = w + sum_k alpha_k delta_k`` (McMahan et al., 2017).

    Args:
        norm_bound: See :class:`FDCR`; by default no bound.
        max_weight_share: Likewise.
        clip: Longer updates are scaled down to this norm, ``alpha_k min(1, clip / ||delta_k||)`` (Sun et al., "Can
            You Really Backdoor Federated Learning?", 2019), or to the median norm with ``"median"``. The weights then
            add up to less than 1.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    sharded = True
    norm_bound: float | None = None
    max_weight_share: float | None = None
    clip: float | Literal["median"] | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if self.clip not in (None, "median") and not (isinstance(self.clip, float | int) and 0 < self.clip < math.inf):
            raise ValueError(f"clip must be None, 'median', or a positive finite norm, got {self.clip!r}")

    @property
    def needs_norms(self) -> bool:
        """Whether updates are clipped."""
        return self.clip is not None

    def weights(self, clients: ClientUpdates, kept: Tensor) -> Tensor:
        """Shares of the samples, less for updates that are clipped."""
        shares = self.shares(clients, kept)
        if self.clip is None or not kept.any():
            return shares
        norms = clients.squared_norm.sqrt()
        longest = norms[kept].median() if isinstance(self.clip, str) else self.clip
        return torch.where(kept & (norms > longest), shares * (longest / norms), shares)


@dataclass(frozen=True, kw_only=True)
class FDCR(AggregationRule):
    """Fisher Discrepancy Cluster and Rescale (Huang et al., NeurIPS 2024).

    Importance ``I_k`` is the client's Fisher mapped to [0, 1] (eq. 6); ``u_k = I_k delta_k`` and ``u = sum_k
    alpha_k u_k`` (eq. 8, 9a) give the discrepancy ``V_k``, the distance of ``u_k`` from ``u`` (eq. 9b). ``V``
    is clustered, the cluster with the largest mean is dropped (eq. 10) if there are at least two, and the
    others' updates are rescaled (eq. 12) and averaged by sample count (eq. 11).

    Args:
        discrepancy: ``"mse"``, the paper's mean square, or ``"l2"``, the distance of the authors' code. Both
            order clients alike, but their gaps, and with them the clusters, differ.
        cluster: ``"finch"``, ``"kmeans"``, ``"dbscan"``, or None to drop nobody (the ablation without
            clustering).
        partition: Of FINCH, ``"first" | "last" | int``; see :func:`fdcr_fast.server.cluster.finch`. The paper
            does not say which, its code takes the first, which has about K/2.5 clusters: with many clients
            few can be dropped.
        rescale: False for the ablation without rescaling: ``c_k = 1``. Rescaling always takes the
            importances, also with ``importance=False``.
        importance: False for the ablation without importance: ``u_k = delta_k``, the discrepancy is that of
            the plain updates.
        norm_bound: Clients with an update norm beyond this multiple of the median norm are rejected before
            anything else, because FINCH can never isolate a single value: one absurd update drags the mean
            until all honest clients look alike, and is kept. None for the bare paper rule.
        learning_rate: ``eta`` of eq. 7, ``g_k = delta_k / eta``: scales the reported V by ``1/eta^2``
            (``"mse"``) or ``1/eta`` (``"l2"``). No decision depends on it.
        eps: Of DBSCAN; see :func:`fdcr_fast.server.cluster.dbscan`.
        min_samples: Likewise.
        max_weight_share: Largest share ``alpha_k`` of one client, whatever it claims; what is cut off goes to the
            others in proportion to their samples. Where so few clients are kept that their shares could not add up to
            1, all count alike. None for no limit.

    ``V`` and the new parameters are computed in one reading of the clients: a sample of the parameters tells who will
    probably be kept, and only if the exact ``V`` disagrees are the parameters computed in a second reading. The result
    is the same either way, to the last bit. Where the updates leave room, products are formed in float32, in float64
    if that would not give ``V`` to 1e-6.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    sharded = True
    discrepancy: str = "mse"
    cluster: str | None = "finch"
    partition: str | int = "first"
    rescale: bool = True
    importance: bool = True
    norm_bound: float | None = 100.0
    learning_rate: float = 1.0
    eps: float = 0.5
    min_samples: int = 2
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        if self.discrepancy not in SCORES:
            raise ValueError(f"discrepancy must be one of {sorted(SCORES)}, got {self.discrepancy!r}")
        if self.cluster is not None and self.cluster not in CLUSTERINGS:
            raise ValueError(f"cluster must be None or one of {sorted(CLUSTERINGS)}, got {self.cluster!r}")
        check_partition(self.partition)
        check_density(self.eps, self.min_samples)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        self._check_options()

    def select(self, clients: ClientUpdates) -> Selection:
        """Cluster the discrepancies and drop the cluster with the largest mean."""
        on = clients.on_device()
        alpha = self.shares(on, on.valid)
        for single in (True, False) if passes.fits_single(clients) else (False,):
            scores = passes.scores(on, alpha, reweight=self.importance, single=single)
            if not single or passes.trusted(scores, on, alpha):
                break
        return cast(Selection, _fetched(self._decide(scores.distance, on))[0])

    def _read_norms(
        self, global_params: Tensor, clients: ClientUpdates, finite: Tensor | None
    ) -> tuple[ClientUpdates, Outcome | None]:
        """The norms, from the one reading of scores and mean if nobody seems to be rejected.

        On a device a guess would have to be waited for: there everybody is taken to pass.
        """
        if clients.num_params >= ops.STRETCH:
            single, passing = passes.may_fit_single(clients), True
            if clients.tiles.device.type == "cpu":
                guess = clients.with_norms(passes.sampled_norms(clients))
                single, passing = passes.fits_single(guess), self._all_pass(guess)
            if passing:
                outcome, known = self._read(global_params, clients, single, finite)
                if self._all_pass(known) and passes.fits_single(known) == single:
                    return known, outcome
        return super()._read_norms(global_params, clients, finite)

    def _all_pass(self, clients: ClientUpdates) -> bool:
        """Whether nobody is rejected, nor would be if norms were a little different."""
        bound = None if self.norm_bound is None else max(self.norm_bound * (1 - _NORM_MARGIN), 1.0)
        return bool(clients.screened(importance=self.needs_fishers, norm_bound=bound).valid.all())

    def _apply(self, global_params: Tensor, clients: ClientUpdates, finite: Tensor | None) -> Outcome:
        return self._read(global_params, clients, passes.fits_single(clients), finite)[0]

    def _read(
        self, global_params: Tensor, clients: ClientUpdates, single: bool, finite: Tensor | None
    ) -> tuple[Outcome, ClientUpdates]:
        """Scores and the mean over those who will probably be kept in one reading, and the mean again if need be.

        Products are formed in float32 if ``single``, and again in float64 where that is not good enough. Everything is
        decided where the clients' rows are, and fetched at once when the reading is done: on a device the host waits
        once, and once more if products are formed again.

        With the outcome the round with the squared norms of this reading, which are as right as its products.
        """
        on = clients.on_device()
        alpha, expected = self.shares(on, on.valid), on.valid
        if self.cluster is not None:
            guess = passes.sampled_scores(on, alpha, reweight=self.importance, single=single)
            expected = self._decide(guess.distance, on).kept
        while True:
            scores, params = passes.scores_and_mean(
                global_params,
                on,
                alpha,
                self.weights(on, expected),
                reweight=self.importance,
                rescale=self.rescale,
                single=single,
            )
            selection = self._decide(scores.distance, on)
            weights = self.weights(on, selection.kept)
            trusted = passes.trusted(scores, on, alpha) if single else torch.tensor(True)
            foreseen = (selection.kept == expected).all()
            read = clients.with_norms(scores.squared_norm)
            selection, own, trusted, foreseen, finite, *statistics = _fetched(
                selection, weights, trusted, foreseen, finite, *read.statistics
            )
            _require_finite(finite)
            if trusted:
                break
            single, expected = False, sent(selection.kept, on.valid.device)
        if not foreseen:
            params = passes.mean(global_params, on, weights, rescale=self.rescale, single=single)
        return (selection, own, params), clients.with_statistics(*statistics)

    def _decide(self, distance: Tensor, clients: ClientUpdates) -> Selection:
        """From vectors that lie together, on the CPU or not; nothing waits for them."""
        valid, score = clients.valid, SCORES[self.discrepancy]
        scores = score(clients.of_valid(distance), clients.num_params)
        labels = torch.zeros_like(valid, dtype=torch.int64)
        if self.cluster is not None:
            apart = scores.max() - scores.min() > _ROUNDING * scores.max()
            found = CLUSTERINGS[self.cluster](torch.where(apart, scores, 0.0), self)
            labels = found if clients.rows is None else labels.index_copy(0, clients.rows, found)
        largest = labels.max()
        kept = valid & ((labels < largest) | (largest == 0))
        return Selection(kept, score(distance / self.learning_rate**2, clients.num_params), labels)


def _fetched(selection: Selection, *others: Tensor | None) -> list[Any]:
    """The selection with its vectors on the CPU, and others, by one copy."""
    kept, discrepancy, labels, *rest = fetch([selection.kept, selection.discrepancy, selection.labels, *others])
    return [replace(selection, kept=kept, discrepancy=discrepancy, labels=labels), *rest]


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
    _require_finite(finite)
    return None


def _require_finite(finite: Tensor | None) -> None:
    """Raise unless the global parameters are finite, or known to be."""
    if finite is not None and not finite:
        raise ValueError("global_params are not finite")
