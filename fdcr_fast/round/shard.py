"""The parameters that a process holds, and how what is computed from several of them is summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fdcr_fast.round.tiles import Span


class Shard:
    """The parameters that this process holds, here all of them; what is computed from several goes through it."""

    first: int = 0  # the model's parameter that is the first one here

    def within(self, ranges: Tensor, span: Span) -> Tensor:
        """The part of the model's ranges ``[R, 2]`` that lies in a span, counted from the span's first parameter."""
        first = self.first + span.first
        bounds = [(max(start - first, 0), min(stop - first, span.num_params)) for start, stop in ranges.tolist()]
        return torch.tensor([part for part in bounds if part[0] < part[1]], dtype=torch.int64).view(-1, 2)

    def sum(self, spans: Iterable[Span], zeros: Tensor, read: Callable[[Span, Tensor], Tensor]) -> Tensor:
        """A sum over all parameters; ``read`` returns what it is given plus that over a span."""
        total = zeros
        for span in spans:
            total = read(span, total)
        return total

    def sum_vector(self, vector: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all parts of a vector ``[P]``, of which this process has its own, of what ``term`` says."""
        return term(vector)

    def sum_parts(self, part: Tensor) -> Tensor:
        """The sum over all processes of what each has."""
        return part

    def gather(self, vector: Tensor) -> Tensor:
        """A vector ``[P]``, of which every process has its own parameters."""
        return vector

    def own(self, vector: Tensor) -> Tensor:
        """This process's parameters of a vector ``[P]``."""
        return vector


WHOLE = Shard()
