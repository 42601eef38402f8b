"""Fisher Discrepancy Cluster and Rescale: the paper's rule, in one reading of the clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fdcr_fast.server import passes
from fdcr_fast.server.cluster import CLUSTERINGS, check_density, check_partition
from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationRule, Outcome, Selection, require_finite
from fdcr_fast.server.scores import SCORES
from fdcr_fast.server.transfer import fetch, sent

_ROUNDING = 1e-9  # scores that differ by less, such as those of two clients of equal size, are the same score
_NORM_MARGIN = 1e-4  # norms from float32 products are right to much less


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
        self._check_options()
        if self.discrepancy not in SCORES:
            raise ValueError(f"discrepancy must be one of {sorted(SCORES)}, got {self.discrepancy!r}")
        if self.cluster is not None and self.cluster not in CLUSTERINGS:
            raise ValueError(f"cluster must be None or one of {sorted(CLUSTERINGS)}, got {self.cluster!r}")
        check_partition(self.partition)
        check_density(self.eps, self.min_samples)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

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
        if passes.worth_sampling(clients):
            single, passing = passes.may_fit_single(clients), True
            if clients.tiles.device.type == "cpu":
                guess = clients.with_norms(passes.sampled_norms(clients))
                single, passing = passes.fits_single(guess), self._all_pass(guess)
            if passing:
                outcome, statistics = self._read(global_params, clients, single, finite)
                known = clients.with_statistics(*statistics)
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
    ) -> tuple[Outcome, list[Tensor | None]]:
        """Scores and the mean over those who will probably be kept in one reading, and the mean again if need be.

        Products are formed in float32 if ``single``, and again in float64 where that is not good enough. Everything is
        decided where the clients' rows are, and fetched at once when the reading is done: on a device the host waits
        once, and once more if products are formed again.

        With the outcome the statistics of the round, with the squared norms of this reading, which are as right as its
        products.
        """
        on = clients.on_device()
        alpha = self.shares(on, on.valid)
        expected = self._expected(on, alpha, single)
        while True:
            if expected is None:
                scores = passes.scores(on, alpha, reweight=self.importance, single=single)
            else:
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
            foreseen = None if expected is None else (selection.kept == expected).all()
            _, low, high = clients.statistics
            selection, own, trusted, foreseen, finite, *statistics = _fetched(
                selection, weights, trusted, foreseen, finite, scores.squared_norm, low, high
            )
            require_finite(finite)
            if trusted:
                break
            single, expected = False, sent(selection.kept, on.valid.device)
        if not foreseen:
            params = passes.mean(global_params, on, weights, rescale=self.rescale, single=single)
        return (selection, own, params), statistics

    def _expected(self, clients: ClientUpdates, alpha: Tensor, single: bool) -> Tensor | None:
        """Who will probably be kept; None for a round that takes no longer to read twice than to guess."""
        if self.cluster is None:
            return clients.valid
        if not passes.worth_sampling(clients):
            return None
        guess = passes.sampled_scores(clients, alpha, reweight=self.importance, single=single)
        return self._decide(guess.distance, clients).kept

    def _decide(self, distance: Tensor, clients: ClientUpdates) -> Selection:
        """From vectors that lie together, on the CPU or not; nothing waits for them."""
        valid, score = clients.valid, SCORES[self.discrepancy]
        scores = score(clients.of_valid(distance), clients.num_params)
        if self.cluster is None:
            labels = torch.zeros_like(valid, dtype=torch.int64)
        else:
            low, high = scores.aminmax()
            apart = high - low > _ROUNDING * high
            labels = CLUSTERINGS[self.cluster](torch.where(apart, scores, 0.0), self)
            if clients.rows is not None:
                labels = torch.zeros_like(valid, dtype=torch.int64).index_copy(0, clients.rows, labels)
        kept = valid & (labels < labels.max().clamp(min=1))
        return Selection(kept, score(distance / self.learning_rate**2, clients.num_params), labels)


def _fetched(selection: Selection, *others: Tensor | None) -> list[Any]:
    """The selection with its vectors on the CPU, and others, by one copy."""
    kept, discrepancy, labels, *rest = fetch([selection.kept, selection.discrepancy, selection.labels, *others])
    return [Selection(kept, discrepancy, labels), *rest]
