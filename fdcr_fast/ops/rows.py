"""Copies of what clients send into tiled client matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdcr_fast.ops.operator import BLOCK_ELEMENTS, operator
from fdcr_fast.ops.tiles import check_clients, check_numbers, check_vectors


def _check_fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> None:
    torch._check(row.dim() == 2, lambda: f"expected a row [T, L], got {tuple(row.shape)}")
    _check_fill_rows(values, row[:, None], base)
    check_numbers("statistics", statistics, 3)


def _fake_fill_row(values: object, row: object, statistics: Tensor, *_: object) -> Tensor:
    return torch.empty_like(statistics)


@operator(
    check=_check_fill_row,
    fake=_fake_fill_row,
    gpu_kernels=("triton",),
    schema="(Tensor[] values, Tensor(a!) row, Tensor statistics, Tensor? base=None) -> Tensor",
)
def fill_row(values: Sequence[Tensor], row: Tensor, statistics: Tensor, base: Tensor | None = None) -> Tensor:
    """Copy a vector into one client's row of a tiled client matrix, and take statistics of it, in one pass.

    Number ``p`` of the concatenated ``values``, less ``base[p]``, goes to ``row[p // L, p % L]``, rounded to its dtype;
    what lies behind the last number is not touched. The statistics are those of the rounded numbers, NaN if any of them
    is NaN.

    Args:
        values: Vectors of any strides, or contiguous tensors of any shape, that make up one vector ``[P]`` in this
            order; floating, any dtypes.
        row: ``[T, L]``, floating; written.
        statistics: Those of the numbers before these, float64 ``(squared norm, smallest, largest)``; ``(0, inf, -inf)``
            where there are none. The compiled kernels give a vector that is copied in parts of a multiple of
            :data:`~fdcr_fast.ops.STRETCH` numbers, in order, the same bits as in one, for any tiles.
        base: ``[P]``, float32 or float64; the values are rounded to its dtype before it is taken from them. None for
            zeros.

    Returns:
        ``[3]`` float64, the statistics with these numbers.
    """
    num_params = sum(piece.numel() for piece in values)
    if num_params == 0:
        return statistics.clone()
    (vector,) = _filled(values, row[:, None], base)
    norm, low, high = statistics.unbind()
    for start in range(0, num_params, BLOCK_ELEMENTS):
        block = vector[start : start + BLOCK_ELEMENTS].double()
        norm = norm + block.square().sum().to(statistics.device)
        low = torch.minimum(low, block.amin().to(statistics.device))
        high = torch.maximum(high, block.amax().to(statistics.device))
    return torch.stack([norm, low, high])


def _check_fill_rows(values: Sequence[Tensor], rows: Tensor, base: Tensor | None = None) -> None:
    torch._check(rows.dim() == 3, lambda: f"expected a client matrix [T, K, L], got {tuple(rows.shape)}")
    num_params = check_vectors("values", values, rows.shape[1])
    check_clients(num_params, rows)
    if base is not None:
        torch._check(
            base.dtype in (torch.float32, torch.float64) and base.shape == (num_params,),
            lambda: f"base must be float32 or float64 [{num_params}], got {base.dtype} {tuple(base.shape)}",
        )


def _fake_fill_rows(*_: object) -> None:
    return None


@operator(
    check=_check_fill_rows,
    fake=_fake_fill_rows,
    schema="(Tensor[] values, Tensor(a!) rows, Tensor? base=None) -> ()",
)
def fill_rows(values: Sequence[Tensor], rows: Tensor, base: Tensor | None = None) -> None:
    """Copy the vectors of all clients into a tiled client matrix, as :func:`fill_row` does with one of them.

    Args:
        values: As in :func:`fill_row`, those that make up the vectors of the clients ``[P]``, one client after the
            other.
        rows: Tiled client matrix ``[T, K, L]`` with at least one client; written.
        base: As in :func:`fill_row`.
    """
    if any(piece.numel() for piece in values):
        _filled(values, rows, base)


def _filled(values: Sequence[Tensor], rows: Tensor, base: Tensor | None) -> Tensor:
    """What was copied into the rows, ``[K, P]``."""
    clients, length = rows.shape[1:]
    dtype = rows.dtype if base is None else base.dtype
    vectors = torch.cat([piece.flatten().to(rows.device, dtype) for piece in values]).view(clients, -1)
    if base is not None:
        vectors = (vectors - base.to(rows.device)).to(rows.dtype)
    tiles, rest = divmod(vectors.shape[1], max(length, 1))
    rows[:tiles].copy_(vectors[:, : tiles * length].view(clients, tiles, length).transpose(0, 1))
    if rest:
        rows[tiles, :, :rest].copy_(vectors[:, tiles * length :])
    return vectors
