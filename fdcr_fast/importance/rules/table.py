"""What a rule is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# (module, input, gradient of the summed losses at its output), both with the samples along dimension 0, to
# {parameter name: sum over samples of the squared per-sample gradient, dense or sparse}.
SumSquares = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

# The sizes of the input's dimensions, besides the first, that might hold the samples instead: those along which the
# layer does the same to every entry, regardless of the others.
Positions = Callable[[nn.Module, torch.Size], torch.Size]


@dataclass(frozen=True)
class Rule:
    """How to get the squared per-sample gradients of one type of layer.

    It is used where the layer was called once and holds the only use of its parameters; ``per_sample`` does the rest.
    """

    sum_squares: SumSquares
    positions: Positions


RULES: dict[type[nn.Module], Rule] = {}


def _all_but_first(module: nn.Module, shape: torch.Size) -> torch.Size:
    return shape[1:]


def rule(*types: type[nn.Module], positions: Positions = _all_but_first) -> Callable[[SumSquares], SumSquares]:
    """Registers a function as the rule of exactly these types; a subclass may compute something else.

    The default ``positions`` are always safe; fewer of them save a forward pass now and then.
    """

    def register(function: SumSquares) -> SumSquares:
        RULES.update(dict.fromkeys(types, Rule(function, positions)))
        return function

    return register
