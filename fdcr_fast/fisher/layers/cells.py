"""The cells of recurrent layers: their way through time and, by hand, the way of the gradients back.

Shapes: ``T`` time steps, ``N`` samples, ``H`` units, ``G`` all gates of all units, ``P`` numbers that are handed to the
next step (``H``, or fewer where an LSTM projects them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The weights of the hidden states ``[G, P]``, with a bias ``[G]``, and of the projection ``[P, H]``."""

    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None


class Run(NamedTuple):
    """The values that a way through time leaves.

    Attributes:
        hidden: ``[T + 1, N, P]``, the initial state first.
        gates: ``[T, N, G]``, behind their nonlinearities.
        cells: ``[T + 1, N, H]`` of LSTMs, the initial state first.
        squashed: ``[T, N, H]``, the hyperbolic tangent of all cells but the first.
        unprojected: ``[T, N, H]``, what is projected to all hidden states but the first.
        inner: ``[T, N, H]``, what the reset gates of GRUs are multiplied with.
    """

    hidden: Tensor
    gates: Tensor
    cells: Tensor | None = None
    squashed: Tensor | None = None
    unprojected: Tensor | None = None
    inner: Tensor | None = None


class Grads(NamedTuple):
    """The gradients at what input and hidden states add to the gates, at projections, and at the initial states."""

    input: Tensor
    hidden: Tensor
    projections: Tensor | None
    initial: tuple[Tensor, ...]


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
        run: The way through time, of what the input adds to the gates ``[T, N, G]`` (may be overwritten) and the
            initial states.
        back: The way back, of a run and the gradients at its outputs ``[T, N, P]`` and at its last states.
    """

    run: Callable[[Tensor, Sequence[Tensor], Weights], Run]
    back: Callable[[Run, Weights, Tensor, Sequence[Tensor]], Grads]


def _lstm(input: Tensor, initial: Sequence[Tensor], weights: Weights) -> Run:
    """An LSTM: ``c' = f c + i g`` and ``h' = o tanh(c')``, projected."""
    gates = input if weights.bias is None else input.add_(weights.bias)
    hidden, cells = (_series(first, len(gates)) for first in initial)
    squashed = torch.empty_like(cells[1:])
    exposed = hidden[1:] if weights.projection is None else torch.empty_like(squashed)
    weight = _transposed(weights.hidden)
    states = hidden[:-1], hidden[1:], cells[:-1], cells[1:], squashed, exposed
    for h, h_next, c, c_next, tanh, out, all_gates, i, f, g, o in _steps(*states, gates, *gates.chunk(4, 2)):
        all_gates.addmm_(h, weight)
        i.sigmoid_()
        f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=c_next).addcmul_(i, g)
        torch.tanh(c_next, out=tanh)
        torch.mul(o, tanh, out=out)
        if weights.projection is not None:
            torch.mm(out, weights.projection.t(), out=h_next)
    return Run(hidden, gates, cells, squashed, None if weights.projection is None else exposed)


def _lstm_back(run: Run, weights: Weights, outputs: Tensor, last: Sequence[Tensor]) -> Grads:
    assert run.cells is not None
    assert run.squashed is not None
    grads = torch.empty_like(run.gates)
    projections = []
    dh, dc = last[0], last[1].clone()
    parts = grads, *grads.chunk(4, 2), *run.gates.chunk(4, 2)
    for grad, c, tanh, d_gates, d_i, d_f, d_g, d_o, i, f, g, o in _back(outputs, run.cells[:-1], run.squashed, *parts):
        dh = dh + grad
        if weights.projection is not None:
            projections.append(dh)
            dh = dh @ weights.projection
        dc += _through_tanh(torch.mul(dh, o, out=d_o), tanh)
        _through_sigmoid(torch.mul(dc, g, out=d_i), i)
        _through_sigmoid(torch.mul(dc, c, out=d_f), f)
        _through_tanh(torch.mul(dc, i, out=d_g), g)
        _through_sigmoid(torch.mul(dh, tanh, out=d_o), o)
        dc *= f
        dh = d_gates @ weights.hidden
    return Grads(grads, grads, torch.stack(projections[::-1]) if projections else None, (dh, dc))


def _gru(input: Tensor, initial: Sequence[Tensor], weights: Weights) -> Run:
    """A GRU: ``h' = (1 - z) n + z h`` with ``n = tanh(x_n + r h_n)``."""
    hidden = _series(initial[0], len(input))
    inner = torch.empty_like(hidden[1:])
    weight = _transposed(weights.hidden)
    for h, h_next, kept, r, z, n in _steps(hidden[:-1], hidden[1:], inner, *input.chunk(3, 2)):
        from_hidden = h @ weight if weights.bias is None else torch.addmm(weights.bias, h, weight)
        h_r, h_z, h_n = from_hidden.chunk(3, 1)
        r.add_(h_r).sigmoid_()
        z.add_(h_z).sigmoid_()
        n.addcmul_(r, kept.copy_(h_n)).tanh_()
        torch.lerp(n, h, z, out=h_next)
    return Run(hidden, input, inner=inner)


def _gru_back(run: Run, weights: Weights, outputs: Tensor, last: Sequence[Tensor]) -> Grads:
    assert run.inner is not None
    of_input, of_hidden = torch.empty_like(run.gates), torch.empty_like(run.gates)
    (dh,) = last
    parts = of_hidden, *of_input.chunk(3, 2), *run.gates.chunk(3, 2)
    for grad, h, h_n, d_hidden, d_r, d_z, d_n, r, z, n in _back(outputs, run.hidden[:-1], run.inner, *parts):
        dh = dh + grad
        past = dh * z
        _through_tanh(torch.sub(dh, past, out=d_n), n)
        _through_sigmoid(torch.mul(d_n, h_n, out=d_r), r)
        _through_sigmoid(torch.sub(h, n, out=d_z).mul_(dh), z)
        torch.cat([d_r, d_z, d_n * r], 1, out=d_hidden)
        dh = past.addmm_(d_hidden, weights.hidden)
    return Grads(of_input, of_hidden, None, (dh,))


def _rnn(function: Callable[[Tensor], Tensor], input: Tensor, initial: Sequence[Tensor], weights: Weights) -> Run:
    """A plain cell: ``h' = function(gates)``, in place."""
    gates = input if weights.bias is None else input.add_(weights.bias)
    hidden = _series(initial[0], len(gates))
    weight = _transposed(weights.hidden)
    for h, h_next, gate in _steps(hidden[:-1], hidden[1:], gates):
        function(torch.addmm(gate, h, weight, out=h_next))
    return Run(hidden, hidden[1:])


def _rnn_back(
    through: Callable[[Tensor, Tensor], Tensor],
    run: Run,
    weights: Weights,
    outputs: Tensor,
    last: Sequence[Tensor],
) -> Grads:
    grads = torch.empty_like(run.gates)
    (dh,) = last
    for grad, h, d_gates in _back(outputs, run.gates, grads):
        dh = through(torch.add(dh, grad, out=d_gates), h) @ weights.hidden
    return Grads(grads, grads, None, (dh,))


# Gradients in front of a function, in the place of those behind it, by what it returned.


def _through_sigmoid(grad: Tensor, y: Tensor) -> Tensor:
    return _sigmoid_backward(grad, y, grad_input=grad)


def _through_tanh(grad: Tensor, y: Tensor) -> Tensor:
    return _tanh_backward(grad, y, grad_input=grad)


def _through_relu(grad: Tensor, y: Tensor) -> Tensor:
    return _threshold_backward(grad, y, 0, grad_input=grad)


_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward.grad_input
_threshold_backward: Callable[..., Tensor] = torch.ops.aten.threshold_backward.grad_input


def _series(first: Tensor, steps: int) -> Tensor:
    """Room for the states of all steps behind the first one."""
    series = first.new_empty(steps + 1, *first.shape)
    series[0] = first
    return series


def _transposed(weight: Tensor) -> Tensor:
    """The transposed weight in memory of its own: products with it are faster by a quarter."""
    return weight.t().contiguous()


def _steps(*series: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.unbind() for x in series), strict=True)


def _back(*series: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(reversed(x.unbind()) for x in series), strict=True)


# All kinds of cells, by the names of PyTorch's functions.
CELLS = {
    "lstm": Cell(_lstm, _lstm_back),
    "gru": Cell(_gru, _gru_back),
    "rnn_tanh": Cell(partial(_rnn, torch.tanh_), partial(_rnn_back, _through_tanh)),
    "rnn_relu": Cell(partial(_rnn, torch.relu_), partial(_rnn_back, _through_relu)),
}
