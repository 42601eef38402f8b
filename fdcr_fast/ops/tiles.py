"""Tiled client matrices: what all operators on them ask of their arguments, and how their references read them.

A *tiled client matrix* is a tensor ``X [T, K, L]`` where parameter ``p`` of client ``k`` is ``X[p // L, k, p % L]``;
what lies behind parameter ``P - 1`` in the last tile is never read. A plain ``[K, P]`` matrix is the tiled matrix
``x.unsqueeze(0)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fdcr_fast.ops.operator import BLOCK_ELEMENTS, check_floating

# How many parameters scores are summed over before they are added, in order: kStretch of csrc/cpu/clients/blocks.inc.
STRETCH = 4096


def check_clients(
    num_params: int,
    updates: Tensor,
    fishers: Tensor | None = None,
    fisher_min: Tensor | None = None,
    fisher_max: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Refuse client matrices that do not hold exactly the parameters, and vectors that do not fit the clients."""
    check_floating(clients=updates)
    torch._check(updates.dim() == 3, lambda: f"expected a client matrix [T, K, L], got {tuple(updates.shape)}")
    tiles, clients, length = updates.shape
    torch._check(
        num_params >= 0 and (tiles - 1) * length < max(num_params, 1) <= max(tiles * length, 1),
        lambda: f"{tiles} tiles of {length} do not hold exactly {num_params} parameters",
    )
    torch._check(
        (fishers is None) == (fisher_min is None) == (fisher_max is None),
        lambda: "fishers, fisher_min and fisher_max go together",
    )
    if fishers is not None:
        check_floating(fishers=fishers)
        torch._check(
            fishers.shape == updates.shape,
            lambda: f"fishers {tuple(fishers.shape)} differ in shape from updates {tuple(updates.shape)}",
        )
    for name, vector in (("fisher_min", fisher_min), ("fisher_max", fisher_max), ("weights", weights)):
        if vector is not None:
            check_numbers(name, vector, clients)


def check_numbers(name: str, vector: Tensor, size: int) -> None:
    """Refuse what is not so many numbers in float64."""
    message = f"{name} must be float64 [{size}], got {vector.dtype} {tuple(vector.shape)}"
    torch._check(vector.dtype == torch.float64 and vector.shape == (size,), partial(str, message))


def check_pieces(name: str, pieces: Sequence[Tensor]) -> int:
    """Refuse what are no floating numbers in a row: vectors of any strides, or contiguous tensors of any shape.

    Returns:
        How many numbers there are in all.
    """
    for piece in pieces:
        check_floating(**{name: piece})
        torch._check(
            piece.dim() == 1 or piece.is_contiguous(),
            partial("{} must be vectors or contiguous, got {} {}".format, name, tuple(piece.shape), piece.stride()),
        )
    return sum(piece.numel() for piece in pieces)


def check_vectors(name: str, pieces: Sequence[Tensor], clients: int) -> int:
    """Refuse pieces that do not make up one vector of each client, all of one length, which is returned."""
    count = check_pieces(name, pieces)
    torch._check(
        clients > 0 and count % clients == 0, lambda: f"{count} numbers are not {clients} vectors of one length"
    )
    return count // clients


def check_read(read: Tensor, clients: int) -> None:
    """Refuse what does not say for each client whether it is read."""
    torch._check(
        read.dtype == torch.bool and read.shape == (clients,),
        lambda: f"read must be bool [{clients}], got {read.dtype} {tuple(read.shape)}",
    )


def column_blocks(tiled: Tensor, num_params: int) -> Iterator[tuple[Tensor, tuple[int, slice]]]:
    """Blocks [K, columns] of a tiled client matrix in the order of the parameters, each with its tile and columns."""
    tiles, clients, length = tiled.shape
    step = max(1, BLOCK_ELEMENTS // max(1, clients))
    for t in range(tiles):
        end = min(length, num_params - t * length)
        for start in range(0, end, step):
            columns = slice(start, min(start + step, end))
            yield tiled[t, :, columns], (t, columns)
