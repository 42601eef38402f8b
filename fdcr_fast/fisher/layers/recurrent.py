"""Recurrent layers, taken apart so that each of their parameters has one linear map of all time steps.

What a cell computes is not linear in its weights. But with the hidden states known, its parameters enter by

    x_t -> x_t W_ih^T + b_ih,    h_{t-1} -> h_{t-1} W_hh^T + b_hh,    m_t -> m_t W_hr^T (LSTMs with projections),

and the gradients that arrive at the results of these maps are those of the whole recursion. So the states are computed
first, outside of the graph; then come the maps, which ``entries`` knows; and then one function that leads from the maps
to the layer's outputs, whose backward pass goes through time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from fdcr_fast.fisher.layers.cells import CELLS, Cell, Run, Weights


class Unrolled:
    """A context manager in which the recurrent layers among ``modules`` are computed so.

    It is left after the backward pass, which may compute parts of the forward pass again. What cannot be computed so
    (packed sequences, under autocast, inside of transformations of ``torch.func``) is computed as ever.

    Attributes:
        wanted: Whether there are such layers; set to False, they are computed as ever.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = [module for module in modules if isinstance(module, nn.RNNBase)]
        self._own: list[Callable[..., Any] | None] = []
        self.wanted = bool(self._layers)

    def __enter__(self) -> Unrolled:
        self._own = [vars(layer).get("forward") for layer in self._layers]
        for layer in self._layers:
            vars(layer)["forward"] = partial(self._forward, layer.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = own

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Functions() if self.wanted else nullcontext():
            return forward(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """A mode that puts :func:`_unrolled` in the place of PyTorch's functions of recurrent layers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CELLS and _can_be_unrolled(*args):
            return _unrolled(_CELLS[func], *args)
        return func(*args, **(kwargs or {}))


_CELLS: dict[Any, Cell] = {getattr(torch, name): cell for name, cell in CELLS.items()}


def _can_be_unrolled(input: Tensor, states: Tensor | Sequence[Tensor], params: Any, has_biases: Any, *_: Any) -> bool:
    if not isinstance(has_biases, bool):  # a packed sequence: all arguments behind it are one place further on
        return False
    tensors = (input, *([states] if isinstance(states, Tensor) else states), *params)
    return (
        torch.is_grad_enabled()
        and input.numel() > 0
        and not torch.is_autocast_enabled(input.device.type)
        and not any(is_functorch_wrapped_tensor(x) for x in tensors)
    )


def _unrolled(
    cell: Cell,
    input: Tensor,
    states: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The results of ``torch.lstm`` and its like: the outputs, and the last states of all layers and directions."""
    x = input.transpose(0, 1) if batch_first else input
    kinds = [states] if isinstance(states, Tensor) else states
    directions = 1 + bidirectional
    size = len(params) // (num_layers * directions)
    last: list[Sequence[Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for backwards in range(directions):
            number = layer * directions + backwards
            own = params[number * size : (number + 1) * size]
            initial = [kind[number] for kind in kinds]
            output, *reached = _direction(cell, x.flip(0) if backwards else x, initial, own, has_biases)
            outputs.append(output.flip(0) if backwards else output)
            last.append(reached)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    if batch_first:
        # No view: a change in place would move that to a node of the graph which says nothing of the samples.
        x = x.transpose(0, 1)
        x = torch.ops.aten._unsafe_view.default(x, x.shape)
    return (x, *map(torch.stack, zip(*last, strict=True)))


def _direction(
    cell: Cell, input: Tensor, initial: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, ...]:
    """One layer in one direction: from ``[T, N, F]`` to outputs ``[T, N, P]`` and the last states."""
    weight_ih, weight_hh, *others = params
    bias_ih, bias_hh = others[:2] if has_biases else (None, None)
    weight_hr = others[-1] if len(others) % 2 else None
    of_input = F.linear(input.flatten(0, 1), weight_ih, bias_ih)
    shape = (*input.shape[:2], -1)
    weights = Weights(weight_hh.detach(), _detached(bias_hh), _detached(weight_hr))
    with torch.no_grad():
        run = cell.run(of_input.detach().view(shape), [x.detach() for x in initial], weights)
    maps = [of_input.view(shape), _known_map(run.hidden[:-1], weight_hh, bias_hh)]
    if weight_hr is not None and run.unprojected is not None:
        maps.append(_known_map(run.unprojected, weight_hr, None))
    outputs: tuple[Tensor, ...] = _FdcrRecursion.apply(cell, run, weights, *maps, *initial)
    return outputs


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _known_map(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    of_all_steps: Tensor = _FdcrKnownMap.apply(input.flatten(0, 1), weight.t(), bias)
    steps, samples, _ = input.shape
    return of_all_steps.view(steps, samples, -1)


class _FdcrKnownMap(torch.autograd.Function):
    """``input @ weight + bias`` as a place in the graph alone: who takes the result has its values already."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input)
        return input.new_empty(()).expand(len(input), weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        (input,) = ctx.saved_tensors
        return None, input.t() @ grad, grad.sum(0) if ctx.needs_input_grad[2] else None


class _FdcrRecursion(torch.autograd.Function):
    """The function from the maps and the initial states to the outputs and the last states of a run."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, run: Run, weights: Weights, *differentiable: Tensor) -> tuple[Tensor, ...]:
        ctx.cell = cell
        ctx.save_for_backward(*run, *weights)
        states = [run.hidden] if run.cells is None else [run.hidden, run.cells]
        # Copies: the model may write to them.
        return run.hidden[1:].clone(), *(x[-1].clone() for x in states)

    @staticmethod
    def backward(ctx: Any, outputs: Tensor, *last: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        saved = ctx.saved_tensors
        run, weights = Run(*saved[: len(Run._fields)]), Weights(*saved[len(Run._fields) :])
        grads = ctx.cell.back(run, weights, outputs, last)
        maps = (x for x in (grads.input, grads.hidden, grads.projections) if x is not None)
        return None, None, None, *maps, *grads.initial


def _refuse_second_derivatives() -> None:
    """Raises inside of second derivatives, to which the states, which are no part of the graph, would be constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("unrolled recurrent layers have no second derivatives")


# Those of this module.
FUNCTIONS = (_FdcrKnownMap, _FdcrRecursion)
