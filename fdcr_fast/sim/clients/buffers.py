"""Buffers of the models of a round, such as BatchNorm's running statistics: sent out, sent back, made new ones of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdcr_fast import ParamLayout
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.state_dicts.buffers import held_mean
from fdcr_fast.store.shared_memory import SharedTensor

_NONE = ParamLayout((), ())


class RoundBuffers:
    """Buffers of the global model, and of every client's, float64 ``[B]``, shared with worker processes.

    No rule decides about buffers. They become the mean over the clients that the rule kept, with its weights, held
    between the quartiles of their values: see :meth:`fdcr_fast.AggregationRule.buffer_trim` and
    :class:`fdcr_fast.StateStore`, which does the same.

    Args:
        layout: Where which buffer lies.
        dtypes: The buffers' own, by name; integers stay integers.
        capacity: Number of clients of a round.
    """

    def __init__(
        self, layout: ParamLayout = _NONE, dtypes: Mapping[str, torch.dtype] | None = None, capacity: int = 0
    ) -> None:
        self.layout = layout
        self._dtypes = dict(dtypes or {})
        self._rows = SharedTensor((1 + capacity, layout.numel), torch.float64)

    @property
    def sent(self) -> Tensor:
        """Those of the global model, as sent out; whoever sets them writes into this."""
        return self._rows.tensor[0]

    def for_clients(self, capacity: int) -> RoundBuffers:
        """Room for the same buffers of another number of clients."""
        return RoundBuffers(self.layout, self._dtypes, capacity)

    def __getitem__(self, row: int) -> Tensor:
        """Those that the client of a row of the store has sent, a copy."""
        return self._rows.tensor[1 + row].clone()

    def put(self, row: int, buffers: Tensor) -> None:
        """Those that the client of a row of the store sends."""
        if self.layout.numel:
            self._rows.tensor[1 + row] = buffers

    def problem(self, row: int) -> str | None:
        """Why what a client sent cannot be used: not finite where the global model's are."""
        wrong = self.sent.isfinite() & ~self._rows.tensor[1 + row].isfinite()
        if not wrong.any():
            return None
        name = next(name for name, part in self.layout.unflatten(wrong).items() if part.any())
        return f"buffer {name} is not finite"

    def combined(self, rule: AggregationRule, result: AggregationResult, rows: Mapping[int, int]) -> Tensor:
        """The buffers of the new global model ``[B]``.

        Args:
            rule: The rule.
            result: What it made of the round.
            rows: Row by client.
        """
        counting = result.weights.nonzero().flatten()
        if not len(counting) or not self.layout.numel:
            return self.sent.clone()
        places = [1 + rows[int(str(result.clients[k]))] for k in counting.tolist()]
        values = self._rows.tensor[places]
        mean = held_mean(values, result.weights[counting].double(), rule.buffer_trim(len(counting)))
        mean = torch.where(values.isfinite().all(0), mean, self.sent)
        for name, part in self.layout.unflatten(mean).items():
            dtype = self._dtypes[name]
            part.copy_(part.to(dtype) if dtype.is_floating_point else part.round())
        return mean
