"""The mean, and then training on the server's data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.foreseen import MeanRule
from fdcr_fast.rules.server_data.callables import check_callable, checked_vector, same_memory
from fdcr_fast.rules.server_options import ServerOptions


@dataclass(frozen=True, kw_only=True)
class Finetuning(MeanRule):
    """FedAvg, and then training on the server's own data: ``w'' = refine(w')``.

    The plain use of clean data against a backdoor, as in the fine-tuning baseline of Liu et al., "Fine-Pruning" (RAID
    2018), after every round. Where no client can be used nothing is refined.

    Args:
        refine: Function from global parameters ``[P]``, which it may change, to better ones.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
        max_weight_share: Largest share of one client in the mean; by default there is no limit.
    """

    needs_server_data = True
    refine: Callable[[Tensor], Tensor]
    norm_bound: float | None = None
    max_weight_share: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        check_callable(self, "refine", "better ones [P]")

    @classmethod
    def from_options(cls, options: ServerOptions) -> Finetuning:
        """The rule that trains on the server's data."""
        return cls(refine=options.needed_data().refine)

    def of_mean(self, global_params: Tensor, clients: ClientUpdates, mean: Tensor) -> Tensor:
        """The mean, refined."""
        refined = checked_vector(mean, self.refine(mean), "refine")
        return refined if same_memory(refined, mean) else refined.clone(memory_format=torch.contiguous_format)
