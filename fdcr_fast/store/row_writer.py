"""What fills a store's rows with what clients send: in the process of the store, or in others that share its memory."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.layout import ParamLayout
from fdcr_fast.round.screening import rejection_reason
from fdcr_fast.store.rows import FISHER, UPDATE, Accepted, Rows, Vectors
from fdcr_fast.store.upload import shown, vector_pieces


@dataclass(frozen=True, eq=False)
class RowWriter:
    """Validates a contribution in the one pass that copies it into a row.

    Attributes:
        rows: The rows that are filled.
        layout: Names and shapes of the parameters, for mappings by name.
        buffer_dtype: The dtype of the numbers in raw buffers.
    """

    rows: Rows
    layout: ParamLayout | None
    buffer_dtype: torch.dtype

    def fill(
        self, row: int, client: Hashable, update: Any, fisher: Any, num_samples: Any, base: Tensor | None = None
    ) -> Accepted:
        """Fill a row that is nobody's until its client is accepted; see :meth:`UpdateStore.put`.

        Raises:
            ValueError: why the client cannot be.
        """
        count = _number(num_samples)
        _require_usable(count)
        vectors: Vectors = {UPDATE: self._pieces("update" if base is None else "state", update)}
        with_fishers = self.rows.shape.with_fishers
        if with_fishers:
            vectors = {**vectors, FISHER: self._pieces("Fisher", fisher)}
        statistics, checksum = self.rows.fill(row, vectors, base)
        norm = statistics[UPDATE][0].item() if UPDATE in statistics else None
        low, high = statistics[FISHER][1:].tolist() if FISHER in statistics else (None, None)
        _require_usable(count, norm, low, high)
        return Accepted(client, row, count, math.nan if norm is None else norm, low or 0.0, high or 0.0, checksum)

    def checked_base(self, base: Any) -> Tensor | None:
        """The server's own ``w [P]``, if it can be taken from what clients send, without gradients; None for none.

        Raises:
            TypeError: it is no tensor.
            ValueError: it is of another shape or dtype, or on another device.
        """
        if base is None:
            return None
        if not isinstance(base, Tensor):
            raise TypeError(f"base must be a tensor, got {type(base).__name__}")
        num_params, device = self.rows.shape.num_params, self.rows.device
        fits = base.shape == (num_params,) and base.dtype in (torch.float32, torch.float64)
        if not fits or base.device.type != device.type:
            raise ValueError(
                f"base must be float32 or float64 [{num_params}] on {device}, got {base.dtype} {list(base.shape)} on "
                f"{base.device}"
            )
        return base.detach() if base.requires_grad else base

    def _pieces(self, name: str, values: Any) -> list[Tensor]:
        pieces = vector_pieces(name, values, self.rows.shape.num_params, self.layout, self.buffer_dtype)
        device = self.rows.device
        return [piece if piece.device == device else piece.to(device) for piece in pieces]


def check_layout(layout: ParamLayout | None, num_params: int) -> None:
    """Raise unless the layout is none, or one of so many parameters.

    Raises:
        TypeError: it is no layout.
        ValueError: it has another number of parameters.
    """
    if layout is not None and not isinstance(layout, ParamLayout):
        raise TypeError(f"layout must be a ParamLayout, got {layout!r}")
    if layout is not None and layout.numel != num_params:
        raise ValueError(f"the layout has {layout.numel} parameters, the store {num_params}")


def _require_usable(
    num_samples: float, squared_norm: float | None = None, low: float | None = None, high: float | None = None
) -> None:
    reason = rejection_reason(num_samples, squared_norm, low, high)
    if reason is not None:
        raise ValueError(reason)


def _number(value: Any) -> float:
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError("text is no number, even where it looks like one")
        return float(value.item() if isinstance(value, Tensor | np.ndarray) else value)
    except Exception:  # the object is the client's, and so is whatever it raises
        raise ValueError(f"the sample count must be a number, got {shown(value)}") from None
