"""What a rule is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# (module, input, gradient of the summed losses at its output), both with the samples along dimension 0, to
# {parameter name: sum over samples of the squared per-sample gradient, dense or sparse}.
SumSquares = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """How to get the squared per-sample gradients of one type of layer.

    It is used where the layer was called once and holds the only use of its parameters; ``per_sample`` does the rest.

    Attributes:
        sum_squares: The rule itself.
        own_dims: How many of the input's last dimensions the layer works on, the same for every entry of those before
            them: the rule is given the samples first and all others of these after them. None for layers with the
            samples in dimension 0 and all other dimensions their own.
        batched: Whether an input of such a layer has a dimension for the samples at all.
        params: Names of the parameters that such layers may have.
        forward: The forward pass that the rule is about; a replaced one may compute something else.
        holds: Whether such a layer's parameters have the shapes that it makes them with, as far as others would do.
    """

    sum_squares: SumSquares
    own_dims: Callable[[nn.Module], int] | None
    batched: Callable[[nn.Module, Tensor], bool]
    params: tuple[str, ...]
    forward: Callable[..., Any]
    holds: Callable[[nn.Module], bool]

    def holds_for(self, module: nn.Module) -> bool:
        """Whether a module of the rule's type computes what the type does, with the type's own parameters."""
        return (
            vars(module).keys().isdisjoint(("forward", *self.params))
            and type(module).forward is self.forward
            and set(module._parameters) <= set(self.params)
            and self.holds(module)
        )

    def leading_dims(self, module: nn.Module, input: Tensor) -> int:
        """How many of the input's first dimensions are the samples and what the layer does not tell from them."""
        if self.own_dims is None:
            return int(self.batched(module, input))
        return input.dim() - self.own_dims(module)


RULES: dict[type[nn.Module], Rule] = {}


def rule(
    *types: type[nn.Module],
    own_dims: Callable[[nn.Module], int] | None = None,
    batched: Callable[[nn.Module, Tensor], bool] = lambda module, input: True,
    params: tuple[str, ...] = ("weight", "bias"),
    holds: Callable[[nn.Module], bool] = lambda module: True,
) -> Callable[[SumSquares], SumSquares]:
    """Registers a function as the rule of exactly these types; a subclass may compute something else."""

    def register(function: SumSquares) -> SumSquares:
        RULES.update({t: Rule(function, own_dims, batched, params, t.forward, holds) for t in types})
        return function

    return register
