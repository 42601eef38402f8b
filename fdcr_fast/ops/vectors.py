"""Clients' vectors where they came, in pieces: such as the entries of a state dict."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fdcr_fast.ops.aggregation import discrepancy, discrepancy_and_mean, norms_and_mean, rescaled_mean
from fdcr_fast.ops.operator import BLOCK_ELEMENTS, operator
from fdcr_fast.ops.rows import fill_rows
from fdcr_fast.ops.tiles import check_numbers, check_pieces, check_vectors


class SplitVector:
    """A vector in pieces, vectors or contiguous tensors, of which parts are wanted."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = list(pieces)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(piece.numel() for piece in self.pieces))

    def between(self, start: int, stop: int) -> list[Tensor]:
        """Numbers ``[start, stop)``, at least one, in pieces."""
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop)
        begin = self._ends[first - 1] if first else 0
        if first == last:
            return [self.pieces[first].flatten()[start - begin : stop - begin]]
        found = self.pieces[first : last + 1]
        found[0] = found[0].flatten()[start - begin :]
        found[-1] = found[-1].flatten()[: stop - self._ends[last - 1]]
        return found


def _check_vector_range(values: Sequence[Tensor], clients: int) -> None:
    num_params = check_vectors("values", values, clients)
    torch._check(num_params > 0, lambda: "the range of no numbers is undefined")


def _fake_vector_range(values: Sequence[Tensor], clients: int) -> tuple[Tensor, Tensor]:
    low, high = (values[0].new_empty(clients, dtype=torch.float64) for _ in range(2))
    return low, high


@operator(check=_check_vector_range, fake=_fake_vector_range)
def vector_range(values: Sequence[Tensor], clients: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each client, as :func:`importance_range` tells them; NaN if any is NaN.

    Args:
        values: As in :func:`fill_rows`; at least one number of each client.
        clients: ``K``.

    Returns:
        ``(minimum, maximum)``, float64 ``[K]``.
    """
    vectors = SplitVector(values)
    num_params = sum(piece.numel() for piece in values) // clients
    rows = [vectors.between(k * num_params, (k + 1) * num_params) for k in range(clients)]
    low = [torch.stack([piece.amin().double() for piece in row if piece.numel()]).amin() for row in rows]
    high = [torch.stack([piece.amax().double() for piece in row if piece.numel()]).amax() for row in rows]
    return torch.stack(low), torch.stack(high)


def _check_aggregate_vectors(
    global_params: Tensor | None,
    updates: Sequence[Tensor],
    base: Tensor | None,
    fishers: Sequence[Tensor],
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    alpha: Tensor | None,
    weights: Tensor | None,
    totals: Tensor,
    reweight: bool,
    rescale: bool,
    single: bool,
) -> None:
    shares = {name: x for name, x in (("alpha", alpha), ("weights", weights)) if x is not None}
    torch._check(len(shares) > 0, lambda: "alpha, weights or both must be given")
    clients = next(iter(shares.values())).numel()
    num_params = check_vectors("updates", updates, clients)
    if weights is not None:
        torch._check(
            global_params is not None and global_params.is_floating_point() and global_params.shape == (num_params,),
            lambda: f"expected global_params [{num_params}], floating point, for a mean",
        )
    if base is not None:
        torch._check(
            base.dtype == torch.float32 and base.shape == (num_params,),
            lambda: f"base must be float32 [{num_params}], got {base.dtype} {tuple(base.shape)}",
        )
    given = len(fishers) > 0
    torch._check(
        given == (fisher_min is not None) == (fisher_max is not None),
        lambda: "fishers, fisher_min and fisher_max go together",
    )
    torch._check(given or not (reweight or rescale), lambda: "importances need fishers")
    if given:
        numbers = check_pieces("fishers", fishers)
        count = num_params * clients
        torch._check(numbers == count, lambda: f"fishers have {numbers} numbers, updates {count}")
    for name, vector in {"fisher_min": fisher_min, "fisher_max": fisher_max, **shares}.items():
        if vector is not None:
            check_numbers(name, vector, clients)
    if alpha is not None:
        check_numbers("totals", totals, 2 * clients + 1)
    elif totals.numel():
        check_numbers("totals", totals, clients)
        torch._check(not rescale, lambda: "norms come beside the plain mean alone")


def _fake_aggregate_vectors(
    global_params: Tensor | None,
    updates: object,
    base: object,
    fishers: object,
    fisher_min: object,
    fisher_max: object,
    alpha: Tensor | None,
    weights: Tensor | None,
    totals: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    if weights is None or global_params is None:
        return torch.empty_like(totals), totals.new_empty(0)
    return torch.empty_like(totals), torch.empty_like(global_params, memory_format=torch.contiguous_format)


@operator(check=_check_aggregate_vectors, fake=_fake_aggregate_vectors)
def aggregate_vectors(
    global_params: Tensor | None,
    updates: Sequence[Tensor],
    base: Tensor | None,
    fishers: Sequence[Tensor],
    fisher_min: Tensor | None,
    fisher_max: Tensor | None,
    alpha: Tensor | None,
    weights: Tensor | None,
    totals: Tensor,
    reweight: bool,
    rescale: bool,
    single: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`discrepancy`, :func:`rescaled_mean` or both from vectors that stay where they are.

    The results have the bits of those from rows that :func:`fill_rows` fills with these vectors, in float32: one tile
    ``[1, K, P]``.

    Args:
        global_params: ``w [P]``; may be None without ``weights``.
        updates: As in :func:`fill_rows`; rounded to float32.
        base: ``[P]``, float32, taken from every client's vector; None for zeros.
        fishers: As ``updates``, without base; empty for none.
        fisher_min: ``[K]`` float64 from :func:`vector_range`, rounded like the numbers; None without ``fishers``.
        fisher_max: ``[K]`` float64, as ``fisher_min``.
        alpha: As in :func:`discrepancy`; None where no scores are wanted.
        weights: As in :func:`rescaled_mean`; None where no mean is wanted.
        totals: ``[2 K + 1]`` float64 as in :func:`discrepancy`; without ``alpha`` ``[K]`` as in :func:`norms_and_mean`,
            or empty.
        reweight: As in :func:`discrepancy_and_mean`, and so is ``rescale``.
        single: As in :func:`discrepancy`.

    Returns:
        ``(totals, params)``, of which the second is empty float64 without ``weights``.
    """
    shares = alpha if alpha is not None else weights
    assert shares is not None, "checked"
    rows, importances, K = SplitVector(updates), SplitVector(fishers), len(shares)
    num_params = sum(piece.numel() for piece in updates) // K
    old = totals.new_empty(num_params) if global_params is None else global_params
    params = old.new_empty(num_params) if weights is not None else totals.new_empty(0)
    totals, ranges = totals.clone(), (fisher_min, fisher_max)
    step = max(1, BLOCK_ELEMENTS // K)
    for start in range(0, num_params, step):
        here = slice(start, min(start + step, num_params))
        u = _block(rows, K, num_params, here, None if base is None else base[here])
        F = _block(importances, K, num_params, here, None) if fishers else None
        reweighted, rescaled = ((F, *ranges) if wanted else (None, None, None) for wanted in (reweight, rescale))
        if weights is None:
            totals = discrepancy.reference(u, *reweighted, shares, totals, u.shape[2], single)
        elif alpha is not None:
            totals, params[here] = discrepancy_and_mean.reference(
                old[here], u, F, *ranges, alpha, weights, totals, reweight, rescale, single
            )
        elif totals.numel():
            totals, params[here] = norms_and_mean.reference(old[here], u, weights, totals, single)
        else:
            params[here] = rescaled_mean.reference(old[here], u, *rescaled, weights, single)
    return totals, params


def _block(vectors: SplitVector, clients: int, num_params: int, here: slice, base: Tensor | None) -> Tensor:
    """Columns of all clients as a tiled client matrix in float32."""
    rows = torch.empty(1, clients, here.stop - here.start)
    starts = (k * num_params for k in range(clients))
    pieces = [piece for first in starts for piece in vectors.between(first + here.start, first + here.stop)]
    fill_rows.reference(pieces, rows, base)
    return rows
