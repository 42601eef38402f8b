"""How alike clients are in the parameters that matter to them (the paper's figure 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.tiles import Span

MOST_NUMBERS = 1 << 20  # Fishers of all clients that are looked at in one step


def importance_similarity(uploads: ClientUpdates, clients: Sequence[int]) -> Tensor:
    """Cosine similarity of the importance vectors of ``S`` clients (figure 1), float64 ``[S, S]``.

    Those without an upload have NaN.

    Raises:
        ValueError: there are no Fishers.
    """
    if uploads.fisher_min is None or uploads.fisher_max is None:
        raise ValueError("the uploads have no Fishers")
    row = {client: index for index, client in enumerate(uploads.clients)}
    present = [index for index, client in enumerate(clients) if client in row]
    rows = torch.tensor([row[clients[index]] for index in present], dtype=torch.int64)
    low, high = uploads.fisher_min[rows, None], uploads.fisher_max[rows, None]

    at_a_time = max(1, MOST_NUMBERS // max(1, len(rows) * uploads.tiles.tile))

    def read(span: Span, total: Tensor) -> Tensor:
        assert span.fishers is not None  # there are ranges of them
        for first in range(0, len(span.fishers), at_a_time):
            fishers = span.fishers[first : first + at_a_time, rows].transpose(0, 1).flatten(1).double()
            importance = (fishers[:, : span.num_params - first * uploads.tiles.tile] - low) / (high - low)
            total = total + importance @ importance.T
        return total

    gram = uploads.sum(torch.zeros(len(rows), len(rows), dtype=torch.float64), read)
    norms = gram.diagonal().sqrt()
    similarity = torch.full((len(clients), len(clients)), float("nan"), dtype=torch.float64)
    places = torch.tensor(present, dtype=torch.int64)
    similarity[places[:, None], places] = gram / (norms[:, None] * norms)
    return similarity
