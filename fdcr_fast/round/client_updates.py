"""What a rule sees of one round, from matrices or from a store."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdcr_fast import ops
from fdcr_fast.round.arguments import different_ids, require_finite
from fdcr_fast.round.screening import (
    ON_EMPTY,
    OnEmpty,
    count_fits,
    fisher_fits,
    median_size,
    norm_fits,
    reasons,
    rejection_reason,
)
from fdcr_fast.round.shard import WHOLE, Shard
from fdcr_fast.round.shares import sample_shares
from fdcr_fast.round.tiles import ClientTiles, MatrixTiles, Span
from fdcr_fast.round.vectors import fetch, sent
from fdcr_fast.warning import callers_level

_NARROWEST = 1e-300  # range of a Fisher; float32 has none between this and zero


@dataclass(frozen=True)
class ClientUpdates:
    """One round of ``K`` clients in rows.

    Vectors over clients lie on the CPU, but those of :meth:`on_device`, and those that are not :meth:`fetched` yet.

    Attributes:
        tiles: Updates ``delta_k = w_k - w`` and diagonal Fishers ``F_k``.
        num_samples: ``n_k``, float64 ``[K]``.
        clients: ``K`` client ids.
        squared_norm: ``||delta_k||^2``, float64 ``[K]``; NaN where the round is ``unread``.
        fisher_min: ``min F_k``, float64 ``[K]``, or None without Fishers.
        fisher_max: ``max F_k``, float64 ``[K]``, or None without Fishers.
        valid: bool ``[K]``, the rows that are not rejected.
        rejected: Reason by client id, of rejected rows and of clients that got no row.
        num_params: ``P`` of the model; ``tiles.num_params`` of them are here.
        shard: Which parameters the tiles hold; everything else is about all parameters.
        unread: Whether the updates have not been looked at yet: :meth:`with_norms` must come before anything that takes
            norms.
        rows: Numbers of the valid rows, int64; None for all of them. Follows from ``valid``; see :meth:`with_valid`.
        valid_rows: What picks the valid rows of arrays, or of tensors on a device. It is no tensor on the CPU: NumPy
            takes one of one number for a number.
        finite: Whether the global parameters are; None where that is known to be so. On a device it would have to be
            waited for: whoever fetches something next fetches it as well, see :func:`require_finite`.
    """

    tiles: ClientTiles
    num_samples: Tensor
    clients: tuple[Hashable, ...]
    squared_norm: Tensor
    fisher_min: Tensor | None
    fisher_max: Tensor | None
    valid: Tensor
    rejected: dict[Hashable, str]
    num_params: int
    shard: Shard = WHOLE
    unread: bool = False
    rows: Tensor | None = None
    valid_rows: Any = ...
    finite: Tensor | None = None

    @classmethod
    def from_matrices(
        cls,
        updates: Tensor,
        fishers: Tensor | None,
        num_samples: Sequence[float] | Tensor | Any,
        client_ids: Sequence[Hashable] | None = None,
    ) -> ClientUpdates:
        """View ``updates [K, P]`` and ``fishers [K, P]``, of any strides, as an ``unread`` round; nothing is copied.

        Nothing is fetched either: :meth:`with_norms` and :meth:`fetched` must be called before anything else is.

        Raises:
            TypeError: not floating-point tensors, or sample counts that are not numbers.
            ValueError: shapes, devices, or client ids do not fit, or there is no client.
        """
        tiles = MatrixTiles.of(updates, fishers)
        K, P = updates.shape
        counts = _sample_counts(num_samples, K)
        ids = different_ids(client_ids, K)
        low, high = (None, None) if tiles.fishers is None else ops.importance_range(tiles.fishers, P)
        norm, everybody = map(torch.from_numpy, (np.full(K, np.nan), np.ones(K, dtype=bool)))
        return cls(tiles, counts, ids, norm, low, high, everybody, {}, P, unread=True)

    def but(self, **changes: Any) -> ClientUpdates:
        """The same round with other attributes; ``dataclasses.replace`` takes longer."""
        return type(self)(**{**vars(self), **changes})

    def with_norms(self, squared_norm: Tensor) -> ClientUpdates:
        """The same round with these squared norms, wherever they lie."""
        return self.but(squared_norm=squared_norm, unread=False)

    def with_valid(self, valid: Tensor) -> ClientUpdates:
        """The same round of which these rows, told on the CPU, are not rejected."""
        rows = None if valid.all() else valid.nonzero().flatten()
        return self.but(valid=valid, rows=rows, valid_rows=... if rows is None else rows.numpy())

    def fetched(self) -> ClientUpdates:
        """The same round with all vectors on the CPU; waits for the device, once, where they are not.

        Raises:
            ValueError: the global parameters are not finite.
        """
        if self.tiles.device.type == "cpu":
            return self
        *statistics, finite = fetch([self.squared_norm, self.fisher_min, self.fisher_max, self.finite])
        require_finite(finite)
        return self.with_statistics(*statistics)

    def with_statistics(
        self, squared_norm: Tensor | None, fisher_min: Tensor | None, fisher_max: Tensor | None
    ) -> ClientUpdates:
        """The same round, of which the global parameters are finite, with other statistics."""
        assert squared_norm is not None, "every round has norms"
        return self.but(
            squared_norm=squared_norm, fisher_min=fisher_min, fisher_max=fisher_max, unread=False, finite=None
        )

    def on_device(self) -> ClientUpdates:
        """The same round with its vectors where the rows are, so that nothing computed from them waits."""
        device = self.tiles.device
        if self.valid.device == device:
            return self

        def moved(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else sent(vector, device)

        rows = moved(self.rows)
        return self.but(
            squared_norm=sent(self.squared_norm, device),
            fisher_min=moved(self.fisher_min),
            fisher_max=moved(self.fisher_max),
            num_samples=sent(self.num_samples, device),
            valid=sent(self.valid, device),
            rows=rows,
            valid_rows=... if rows is None else rows,
        )

    @property
    def num_valid(self) -> int:
        """The number of rows that are not rejected."""
        return len(self.clients) if self.rows is None else len(self.rows)

    def of_valid(self, vector: Tensor) -> Tensor:
        """The entries ``[n]`` of a vector ``[K]`` that belong to valid clients."""
        return vector if self.rows is None else vector.index_select(0, self.rows)

    def spans(self) -> Iterable[Span]:
        """The spans of the tiles; see :meth:`ClientTiles.spans`."""
        return self.tiles.spans()

    def sum(self, zeros: Tensor, read: Callable[[Span, Tensor], Tensor]) -> Tensor:
        """A sum over all parameters in one reading; see :meth:`Shard.sum`."""
        return self.shard.sum(self.tiles.spans(), zeros, read)

    @property
    def alpha(self) -> Tensor:
        """Sample shares ``alpha_k`` of the valid clients, 0 for the others; float64 ``[K]``."""
        return sample_shares(self.num_samples, self.valid)

    def screened(self, *, importance: bool, norm_bound: float | None) -> ClientUpdates:
        """The same round after rejecting the clients whose contribution cannot be used.

        Args:
            importance: Whether the rule takes importances, which a constant Fisher leaves undefined.
            norm_bound: Largest update norm in units of the median norm of the clients that are otherwise
                valid (for an even number of them the lower median: of two clients the smaller sets the
                scale). Updates of zero do not count in it: clients that send nothing new would else have all
                others rejected. None for no bound.
        """
        squares = self.squared_norm.numpy()
        usable = count_fits(self.num_samples.numpy()) & norm_fits(squares)
        if self.fisher_min is not None and self.fisher_max is not None:
            low, high = self.fisher_min.numpy(), self.fisher_max.numpy()
            usable &= fisher_fits(low, high)
            if importance:
                usable &= high > low + _NARROWEST  # not a difference, which infinities may not have
        norms = np.sqrt(squares)
        bound = math.inf
        if norm_bound is not None and len(norms) > 0 and not norms.max() <= norm_bound * norms.min():
            median = median_size(norms[usable])
            bound = norm_bound * median
        passing = usable & (norms <= bound)
        if passing.all():
            return self
        rejected = dict(self.rejected)
        for k in (~passing).nonzero()[0].tolist():
            if usable[k]:
                reason = f"the update's norm {norms[k]:.4g} is beyond {norm_bound:g} times the median {median:.4g}"
            else:
                reason = self._reason(k)
            rejected[self.clients[k]] = reason
        return self.with_valid(torch.from_numpy(passing)).but(rejected=rejected)

    def _reason(self, k: int) -> str:
        """The reason why a client's contribution, which cannot be used, cannot be."""
        low, high = (None if x is None else x[k].item() for x in (self.fisher_min, self.fisher_max))
        reason = rejection_reason(self.num_samples[k].item(), self.squared_norm[k].item(), low, high)
        return reason or f"the Fisher is constant (every entry is {low:g}): importance is undefined"


def refuse_empty(clients: ClientUpdates, on_empty: OnEmpty) -> None:
    """Raise ValueError with counts and first reasons if nobody can be used and ``on_empty`` asks for it.

    Where all that is wrong is that nobody has samples there is nothing to aggregate, and that is no error.
    """
    if on_empty not in ON_EMPTY:
        raise ValueError(f"on_empty must be one of {ON_EMPTY}, got {on_empty!r}")
    if clients.num_valid:
        return
    text = f"none of {len(clients.rejected)} clients can be used: {reasons(clients.rejected)}"
    if not clients.rejected:
        text = "expected at least one client, got an empty store"
    without_samples = len(clients.clients) > 0 and not clients.num_samples.any()
    if on_empty == "raise" and not without_samples:
        raise ValueError(f'{text} (on_empty="keep" would keep the global parameters)')
    warnings.warn(f"{text}; the global parameters stay as they are", stacklevel=callers_level())


def _sample_counts(num_samples: Any, K: int) -> Tensor:
    try:
        if isinstance(num_samples, Tensor | np.ndarray) and torch.as_tensor(num_samples).is_complex():
            raise TypeError("counts have no imaginary part")
        counts = torch.as_tensor(num_samples, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected num_samples to be {K} numbers, got {num_samples!r}") from error
    if counts.shape == (K, 1):  # of arrays with one number each
        counts = counts[:, 0]
    if counts.shape != (K,):
        raise ValueError(f"expected num_samples [{K}], one per client, got shape {list(counts.shape)}")
    return counts
