"""Rules of layers: what a rule is, the table of all of them, and how they get into it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fdcr_fast.fisher.layers.reachable import USUAL_PARAMS, why_never_called

# (module, input, gradient of the summed losses at its output), both with the samples along dimension 0, to
# {parameter name: sum over samples of the squared per-sample gradient, dense or sparse}.
SumSquares = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """A way to the squared per-sample gradients of one type of layer.

    It is used where the layer was called once and holds the only use of its parameters; ``per_sample`` does the rest.

    Attributes:
        sum_squares: The rule itself.
        own_dims: The number of the input's last dimensions that the layer works on, in the same way for every entry of
            those before them: the rule is given the samples first and all others of these after them. None for layers
            with the samples in dimension 0 and all other dimensions their own.
        batched: Whether an input of such a layer has a dimension for the samples at all.
        params: The names of the parameters that such layers may have.
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
        """Whether a module of the rule's type computes what the type does, with the type's own parameters.

        An attribute may hide neither the forward pass nor a parameter; None hides one that is not there.
        """
        return (
            all(vars(module).get(name) is None for name in ("forward", *self.params))
            and type(module).forward is self.forward
            and set(module._parameters) <= set(self.params)
            and self.holds(module)
        )

    def leading_dims(self, module: nn.Module, input: Tensor) -> int:
        """The number of the input's first dimensions that are samples, or what the layer does not tell from them."""
        if self.own_dims is None:
            return int(self.batched(module, input))
        return input.dim() - self.own_dims(module)


RULES: dict[type[nn.Module], Rule] = {}


def entered(
    *types: type[nn.Module],
    own_dims: Callable[[nn.Module], int] | None = None,
    batched: Callable[[nn.Module, Tensor], bool] | None = None,
    params: Collection[str] | None = None,
    holds: Callable[[nn.Module], bool] = lambda module: True,
) -> Callable[[SumSquares], SumSquares]:
    """:func:`rule` for PyTorch's own layers, which a test looks at once instead of every import."""
    known = USUAL_PARAMS if params is None else tuple(params)

    def register(function: SumSquares) -> SumSquares:
        RULES.update({t: Rule(function, own_dims, batched or _always, known, t.forward, holds) for t in types})
        return function

    return register


def rule(
    *types: type[nn.Module],
    own_dims: Callable[[nn.Module], int] | None = None,
    batched: Callable[[nn.Module, Tensor], bool] | None = None,
    params: Collection[str] | None = None,
    holds: Callable[[nn.Module], bool] = lambda module: True,
) -> Callable[[SumSquares], SumSquares]:
    """A decorator that registers a function as the rule of exactly these types of layers.

    A subclass may compute something else: it needs a rule of its own. What a rule is called with and what it returns
    says ``SumSquares``; the options are those of :class:`Rule`.

    Args:
        types: The classes of the layers.
        own_dims: See :class:`Rule`.
        batched: See :class:`Rule`; for layers without ``own_dims``, by default always.
        params: The names of all parameters that such layers may have of their own, by default ``weight`` and ``bias``
            or one of them.
        holds: See :class:`Rule`.

    Raises:
        TypeError: One of the types is no class of modules.
        ValueError: The rule would never be called, or one of its options would not.
    """
    if not types:
        raise ValueError("rule() needs the classes of the layers: @rule(MyLayer)")
    if own_dims is not None and batched is not None:
        raise ValueError("batched= would never be called: with own_dims=, all dimensions before these may hold samples")
    names = (params,) if isinstance(params, str) else None if params is None else tuple(params)
    for layer in types:
        _refuse_unless_called(layer, names)
    return entered(*types, own_dims=own_dims, batched=batched, params=names, holds=holds)


def _refuse_unless_called(layer: type[nn.Module], params: Collection[str] | None) -> None:
    if not isinstance(layer, type) or not issubclass(layer, nn.Module):
        raise TypeError(f"rules are for classes of torch.nn.Module, got {layer!r}")
    if layer in RULES:
        other = RULES[layer].sum_squares
        raise ValueError(
            f"{layer.__qualname__} has a rule already, {other.__module__}.{other.__qualname__}, and only one of them "
            f"would be called: take that away with RULES.pop({layer.__qualname__})"
        )
    if reason := why_never_called(layer, params):
        raise ValueError(f"a rule of {layer.__qualname__} would never be called: {reason}")


def _always(module: nn.Module, input: Tensor) -> bool:
    return True
