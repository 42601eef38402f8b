"""Fisher Discrepancy Cluster and Rescale: the paper's rule, in one reading of the clients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.arguments import require_finite
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.vectors import arrays, fetch, sent, tensors
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS, check_density, check_partition
from fdcr_fast.rules.fdcr.compared import check_parameters, ranges_of, squared_distances
from fdcr_fast.rules.fdcr.discrepancy import OF_DIRECTIONS, SCORES
from fdcr_fast.rules.foreseen import Read, all_pass, foreseen, foreseen_outcome
from fdcr_fast.rules.pairwise.gram import Ranges
from fdcr_fast.rules.param_groups import ParamGroups
from fdcr_fast.rules.result import Outcome, Selection
from fdcr_fast.rules.server_options import ServerOptions

_ROUNDING = 1e-9  # scores that differ by less, such as those of two clients of equal size, are the same score


@dataclass(frozen=True, kw_only=True)
class FDCR(AggregationRule):
    """Fisher Discrepancy Cluster and Rescale (Huang et al., NeurIPS 2024).

    Importance ``I_k`` is the client's Fisher mapped to [0, 1] (eq. 6); ``u_k = I_k delta_k`` and ``u = sum_k
    alpha_k u_k`` (eq. 8, 9a) give the discrepancy ``V_k``, the distance of ``u_k`` from ``u`` (eq. 9b). ``V``
    is clustered, the cluster with the largest mean is dropped (eq. 10) if there are at least two, and the
    others' updates are rescaled (eq. 12) and averaged by sample count (eq. 11).

    Args:
        discrepancy: ``"mse"``, the paper's mean square, or ``"l2"``, the distance of the authors' code. Both
            order clients alike, but their gaps, and with them the clusters, differ. ``"cosine"`` is ``1 - cos(u_k,
            u)``, in which lengths do not count (not in the paper).
        parameters: Over which parameters clients are compared: ``"all"``, as in the paper, ``"head"`` or ``"features"``
            of the ``groups``, or ranges, slices or pairs ``(start, stop)``, such as ``[layout.slices[name] for name in
            names]``. Importances are those of the whole model, and all parameters are averaged.
        groups: Which parameters are the head and the features; needed by their names alone.
        cluster: ``"finch"``, ``"kmeans"``, ``"dbscan"``, or None to drop nobody (the ablation without
            clustering).
        partition: Partition of FINCH, ``"first" | "last" | int``; see :func:`fdcr_fast.rules.fdcr.clustering.finch`.
            The paper does not say which, its code takes the first, which has about K/2.5 clusters: with many clients
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
        eps: Radius of DBSCAN; see :func:`fdcr_fast.rules.fdcr.clustering.dbscan`.
        min_samples: Number of clients within that radius that make a core of DBSCAN.
        max_weight_share: Largest share ``alpha_k`` of one client, whatever it claims; what is cut off goes to the
            others in proportion to their samples. Where so few clients are kept that their shares could not add up to
            1, all count alike. None for no limit.

    ``V`` and the new parameters are computed in one reading of the clients: a sample of the parameters tells who will
    probably be kept, and only if the exact ``V`` disagrees are the parameters computed in a second reading. The result
    is the same either way, to the last bit. Where the updates leave room, products are formed in float32, in float64
    if that would not give ``V`` to 1e-6. With ``"cosine"`` or with some of the parameters ``V`` follows from the Gram
    matrix of the clients over those parameters, in float64, and the mean takes a reading of its own.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    sharded = True
    discrepancy: str = "mse"
    parameters: str | Ranges = field(default="all", hash=False)  # slices have no hash before Python 3.12
    groups: ParamGroups | None = field(default=None, hash=False)
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
        self._check_options()
        if self.discrepancy not in SCORES:
            raise ValueError(f"discrepancy must be one of {sorted(SCORES)}, got {self.discrepancy!r}")
        if self.cluster is not None and self.cluster not in CLUSTERINGS:
            raise ValueError(f"cluster must be None or one of {sorted(CLUSTERINGS)}, got {self.cluster!r}")
        check_parameters(self.parameters)
        check_partition(self.partition)
        check_density(self.eps, self.min_samples)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> FDCR:
        """The rule that knows the model's head, and reports ``V`` in the scale of the clients' learning rate."""
        return cls(learning_rate=options.learning_rate, groups=options.groups)

    @property
    def _compares_pairs(self) -> bool:
        """Whether ``V`` follows from inner products, not from one reading of all parameters."""
        return self.discrepancy in OF_DIRECTIONS or self.parameters != "all"

    def select(self, clients: ClientUpdates) -> Selection:
        """Cluster the discrepancies and drop the cluster with the largest mean."""
        on = clients.on_device()
        alpha = self.shares(on, on.valid)
        if self._compares_pairs:
            ranges, directions = self._ranges(clients), self.discrepancy in OF_DIRECTIONS
            distance = squared_distances(on, alpha, ranges, reweight=self.importance, directions=directions)
            return cast(Selection, _fetched(self.decide(distance, on))[0])
        for single in (True, False) if readings.fits_single(clients) else (False,):
            scores = readings.scores(on, alpha, reweight=self.importance, single=single)
            if not single or readings.trusted(scores, on, alpha):
                break
        return cast(Selection, _fetched(self.decide(scores.distance, on))[0])

    def _ranges(self, clients: ClientUpdates) -> list[slice]:
        return ranges_of(self.parameters, self.groups, clients.num_params)

    def _measured(self, global_params: Tensor, clients: ClientUpdates) -> ClientUpdates:
        """The norms come from the one reading, if nobody seems to be rejected."""
        known = None if self._compares_pairs else _OneReading(self, global_params).foreseen(clients)
        return super()._measured(global_params, clients) if known is None else known

    def _outcome(self, global_params: Tensor, clients: ClientUpdates) -> Outcome:
        if self._compares_pairs:
            return super()._outcome(global_params, clients)
        outcome = foreseen_outcome(clients)
        if outcome is None:
            outcome, _ = _OneReading(self, global_params).of(clients, readings.fits_single(clients))
        return outcome

    def decide(self, distance: Tensor, clients: ClientUpdates) -> Selection:
        """What follows from the ``S_k`` and the round, both on the CPU or not; nothing waits for them."""
        xp, S, valid = arrays(distance, clients.valid)
        rows = clients.valid_rows
        score, power = SCORES[self.discrepancy]
        labels = xp.zeros_like(valid, dtype=xp.int64)
        size = clients.num_params
        if self.parameters != "all":
            size = sum(part.stop - part.start for part in self._ranges(clients))
        V = score(S, size)
        if self.cluster is not None:
            scores = V[rows]
            high = scores.max()
            apart = scores.min() < (1 - _ROUNDING) * high  # no difference, which infinities have not
            labels[rows] = CLUSTERINGS[self.cluster](xp.where(apart, scores, 0.0), self)
        kept = valid & ((labels < labels.max()) | (labels == 0))
        kept, V, labels = tensors(kept, V / self.learning_rate**power, labels)
        return Selection(kept, V, labels)


class _OneReading:
    """Scores and the mean over those who will probably be kept from one reading, and the mean again if need be.

    Products are formed in float32 where that seems good enough, and again in float64 where it was not. Everything is
    decided where the clients' rows are, and fetched at once when the reading is done: on a device the host waits once,
    and once more if products are formed again.
    """

    def __init__(self, rule: FDCR, global_params: Tensor) -> None:
        self.rule, self.global_params = rule, global_params

    def foreseen(self, clients: ClientUpdates) -> ClientUpdates | None:
        """A round that nobody has read, if nobody seems to be rejected; it is yet to be screened.

        On a device a guess would have to be waited for: there everybody is taken to pass.
        """
        if not readings.worth_sampling(clients):
            return None
        single, guess = readings.may_fit_single(clients), None
        if clients.tiles.device.type == "cpu":
            guess = self._guess(clients, self.rule.shares(clients, clients.valid))
            known = clients.with_norms(guess.squared_norm)
            single = readings.fits_single(known)
            if not all_pass(self.rule, known):
                return None
        return foreseen(self.rule, clients, single, lambda: self.of(clients, single, guess))

    def of(self, clients: ClientUpdates, single: bool, guess: readings.Scores | None = None) -> Read:
        """The outcome, and the statistics of the round with the squared norms of this reading.

        These are as right as its products, which are in float32 if ``single``.
        """
        rule, on = self.rule, clients.on_device()
        alpha = rule.shares(on, on.valid)
        expected = self._expected(on, alpha, guess)
        while True:
            if expected is None:
                scores = readings.scores(on, alpha, reweight=rule.importance, single=single)
            else:
                scores, params = readings.scores_and_mean(
                    self.global_params,
                    on,
                    alpha,
                    rule.weights(on, expected),
                    reweight=rule.importance,
                    rescale=rule.rescale,
                    single=single,
                )
            trusted = readings.trusted(scores, on, alpha) if single else True
            selection = rule.decide(scores.distance, on)
            weights = rule.weights(on, selection.kept)
            foreseen = False if expected is None else (selection.kept == expected).all()
            read = scores.squared_norm, clients.fisher_min, clients.fisher_max
            selection, own, trusted, foreseen, finite, *statistics = _fetched(
                selection, weights, trusted, foreseen, clients.finite, *read
            )
            require_finite(finite)
            if trusted:
                break
            single, expected = False, sent(selection.kept, on.valid.device)
        if not foreseen:
            params = self.global_params  # lets go of those that were not foreseen: their memory serves the right ones
            params = readings.mean(self.global_params, on, weights, rescale=rule.rescale, single=single)
        return (selection, own, params), statistics

    def _expected(self, clients: ClientUpdates, alpha: Tensor, guess: readings.Scores | None) -> Tensor | None:
        """Who will probably be kept; None for a round that takes no longer to read twice than to guess."""
        if self.rule.cluster is None:
            return clients.valid
        if guess is None:
            if not readings.worth_sampling(clients):
                return None
            guess = self._guess(clients, alpha)
        return self.rule.decide(guess.distance, clients).kept

    def _guess(self, clients: ClientUpdates, alpha: Tensor) -> readings.Scores:
        return readings.sampled_scores(clients, alpha, reweight=self.rule.importance)


def _fetched(selection: Selection, *others: Any) -> list[Any]:
    """The selection with its vectors on the CPU, and others, by one copy."""
    kept, scores, labels, *rest = fetch([selection.kept, selection.scores, selection.labels, *others])
    return [Selection(kept, scores, labels), *rest]
