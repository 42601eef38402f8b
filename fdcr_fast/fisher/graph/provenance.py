"""Which sample every entry of a tensor in the autograd graph belongs to, derived from the losses downwards.

Entry n of the losses is sample n's. From there each node of the graph says where the samples lie in what it was
computed from: an elementwise function leaves them in place, a permutation moves them, a matrix product passes the rows
on to its left factor. The answer for the output of a layer, ``Axis(dim, inner)``, is a proof that sample n's loss
depends on the entries there that are sample n's, and on no others. Where a node is not in the table, or does what the
table cannot express (rows chosen by their values, rows that several samples share), there is no answer: ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

Shape = Sequence[int]


class Axis(NamedTuple):
    """The place of n samples in a tensor: entry i of dimension ``dim`` belongs to sample ``i // inner % n``."""

    dim: int
    inner: int = 1


class Flow(NamedTuple):
    """One edge of the graph: ``source`` was argument number ``argument`` of what computed ``result``."""

    node: Node
    argument: int
    output: int
    result: Shape
    source: Shape
    samples: int


# Where the samples lie in the source of a flow, given where they lie in its result.
Transfer = Callable[[Flow, Axis], Axis | None]


def source_axis(flow: Flow, axis: Axis) -> Axis | None:
    """Where the samples lie in the source of a flow, or None where the graph does not tell."""
    transfer = _TRANSFERS.get(flow.node.name())
    return None if transfer is None else transfer(flow, axis)


def _elementwise(flow: Flow, axis: Axis) -> Axis | None:
    """Sources that are broadcast have the last dimensions of the result, or dimensions of size 1."""
    dim = axis.dim - len(flow.result) + len(flow.source)
    same = dim >= 0 and flow.source[dim] == flow.result[axis.dim]
    return Axis(dim, axis.inner) if same else None


def _same_elements(flow: Flow, axis: Axis) -> Axis | None:
    """Elements in the same order in another shape belong to the same samples: element i to sample ``i // step % n``."""
    if axis == (0, 1) and flow.source[:1] == flow.result[:1]:
        return axis
    step = axis.inner * prod(flow.result[axis.dim + 1 :])
    below = 1  # elements of one entry along the dimension
    for dim in reversed(range(len(flow.source))):
        size = flow.source[dim]
        if step < below * size:
            inner, rest = divmod(step, below)
            return Axis(dim, inner) if inner and rest == 0 and size % (inner * flow.samples) == 0 else None
        below *= size
    return None


def _restrided(flow: Flow, axis: Axis) -> Axis | None:
    """Pooling to one pixel, as a mean, gives its result the strides of images: those of the mean but for sizes of 1."""
    node: Any = flow.node
    source = node.next_functions[0][0].name()
    dense = [prod(flow.result[dim + 1 :]) for dim in range(len(flow.result))]
    same = all(
        size == 1 or given == own for size, given, own in zip(flow.result, node._saved_stride, dense, strict=True)
    )
    return axis if source == "MeanBackward1" and same and flow.source == flow.result else None


def _permuted(flow: Flow, axis: Axis) -> Axis | None:
    return Axis(_dims(flow.node._saved_dims, len(flow.result))[axis.dim], axis.inner)  # type: ignore[attr-defined]


def _swapped(flow: Flow, axis: Axis) -> Axis | None:
    node: Any = flow.node
    if len(flow.result) < 2:
        return axis
    dims = _dims((getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1)), len(flow.result))
    other = {dims[0]: dims[1], dims[1]: dims[0]}
    return Axis(other.get(axis.dim, axis.dim), axis.inner)


def _along_others(name: str = "dim") -> Transfer:
    """Functions that mix, move or choose along some dimensions leave all others as they are."""

    def transfer(flow: Flow, axis: Axis) -> Axis | None:
        touched = _dims(getattr(flow.node, f"_saved_{name}"), len(flow.result))
        same = axis.dim not in touched and flow.source[axis.dim] == flow.result[axis.dim]
        return axis if same and flow.argument == 0 else None

    return transfer


def _concatenated(flow: Flow, axis: Axis) -> Axis | None:
    dims = _dims(flow.node._saved_dim, len(flow.result))  # type: ignore[attr-defined]
    return None if axis.dim in dims or len(flow.source) != len(flow.result) else axis


def _stacked(flow: Flow, axis: Axis) -> Axis | None:
    (dim,) = _dims(flow.node._saved_dim, len(flow.result))  # type: ignore[attr-defined]
    return None if axis.dim == dim else Axis(axis.dim - (axis.dim > dim), axis.inner)


def _entry_of(flow: Flow, axis: Axis) -> Axis | None:
    (dim,) = _dims(flow.node._saved_dim, len(flow.source))  # type: ignore[attr-defined]
    return Axis(axis.dim + (axis.dim >= dim), axis.inner)


def _sliced(flow: Flow, axis: Axis) -> Axis | None:
    """Slices leave the samples in place, but along their dimension only where all of it is taken."""
    return axis if flow.source[axis.dim] == flow.result[axis.dim] else None


def _windows(flow: Flow, axis: Axis) -> Axis | None:
    (dim,) = _dims(flow.node._saved_dimension, len(flow.source))  # type: ignore[attr-defined]
    return None if axis.dim in (dim, len(flow.source)) else axis


def _reduced(flow: Flow, axis: Axis) -> Axis | None:
    reduced = _dims(flow.node._saved_dim, len(flow.source))  # type: ignore[attr-defined]
    if len(flow.result) == len(flow.source):
        return None if axis.dim in reduced else axis
    kept = [dim for dim in range(len(flow.source)) if dim not in reduced]
    return Axis(kept[axis.dim], axis.inner) if len(kept) == len(flow.result) else None


def _repeated(flow: Flow, axis: Axis) -> Axis | None:
    """Copies one after the other must hold whole turns of all samples, where they lie along these."""
    dim = axis.dim - len(flow.result) + len(flow.source)
    whole = dim >= 0 and flow.source[dim] % (axis.inner * flow.samples) == 0
    return Axis(dim, axis.inner) if whole else None


def _all_but_last(count: int) -> Transfer:
    """Layers that do the same to everything in front of their ``count`` last dimensions leave that as it is."""

    def transfer(flow: Flow, axis: Axis) -> Axis | None:
        own = axis.dim >= min(len(flow.result), len(flow.source)) - count
        return None if own or flow.argument != 0 else _sliced(flow, axis)

    return transfer


def _first_dim(flow: Flow, axis: Axis) -> Axis | None:
    """Layers with the samples in dimension 0 of their output have them in dimension 0 of their input."""
    return _sliced(flow, axis) if axis.dim == 0 and flow.argument == 0 else None


def _first_dims_of_both(flow: Flow, axis: Axis) -> Axis | None:
    return _sliced(flow, axis) if axis.dim == 0 else None


def _normalised_shape(flow: Flow, axis: Axis) -> Axis | None:
    shape = flow.node._saved_normalized_shape  # type: ignore[attr-defined]
    return axis if flow.argument == 0 and axis.dim < len(flow.result) - len(shape) else None


def _batch_norm(flow: Flow, axis: Axis) -> Axis | None:
    """Batch normalisation is elementwise with running statistics; as instance normalisation, it keeps channels."""
    training = getattr(flow.node, "_saved_training", False)
    return axis if flow.argument == 0 and (axis.dim == 1 or not training) else None


def _matrix_product(first: int, batched: bool) -> Transfer:
    """Matrix products have the factors as arguments ``first`` and ``first + 1``; one before them is added."""

    def transfer(flow: Flow, axis: Axis) -> Axis | None:
        if flow.argument < first:
            return _elementwise(flow, axis)
        dim = axis.dim - batched
        if dim >= 0 and dim != flow.argument - first:  # rows are of the left factor, columns of the right one
            return None
        return axis

    return transfer


def _vector_product(first: int) -> Transfer:
    def transfer(flow: Flow, axis: Axis) -> Axis | None:
        if flow.argument < first:
            return _elementwise(flow, axis)
        return axis if flow.argument == first else None

    return transfer


def _attention(flow: Flow, axis: Axis) -> Axis | None:
    """Attention has queries, keys and values ``[..., heads, positions, features]``."""
    return _sliced(flow, axis) if flow.argument < 3 and axis.dim < len(flow.result) - 2 else None


def _class_scores(flow: Flow, axis: Axis) -> Axis | None:
    """Losses ``[N, ...]`` have scores ``[N, C, ...]``."""
    return Axis(axis.dim + (axis.dim > 0), axis.inner) if flow.argument == 0 else None


def _recurrent_layer(flow: Flow, axis: Axis) -> Axis | None:
    """Recurrent layers make of inputs ``[T, N, F]`` outputs ``[T, N, H]`` and last states ``[N, H]``."""
    of_samples = axis.dim == (1 if flow.output == 0 else 0)
    return Axis(1, axis.inner) if flow.argument == 0 and of_samples else None


def _recursion(flow: Flow, axis: Axis) -> Axis | None:
    """The recursion of ``recurrent`` takes maps ``[T, N, G]`` and states ``[N, H]`` to ``[T, N, H]`` and states."""
    return Axis(len(flow.source) - 2, axis.inner) if axis.dim == len(flow.result) - 2 else None


def _overwritten(flow: Flow, axis: Axis) -> Axis | None:
    """The rest of an argument that is overwritten stays where it was; of what is written, nothing is known."""
    return axis if flow.argument == 0 and flow.source == flow.result else None


def _hooked(flow: Flow, axis: Axis) -> Axis | None:
    """Nodes of ``register_full_backward_hook`` hand on their arguments."""
    return axis if flow.argument == flow.output and flow.source == flow.result else None


def _indexed(flow: Flow, axis: Axis) -> Axis | None:
    """Indices leave the samples in place in ``x[:, i]``, and also in ``x[arange(n), i]``."""
    indices: Sequence[Tensor | None] = flow.node._saved_indices  # type: ignore[attr-defined]
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if flow.argument != 0 or any(i is not None and i.dtype != torch.int64 for i in indices):
        return None
    picked = torch.broadcast_shapes(*(i.shape for i in indices if i is not None))
    start = given[0] if given[-1] - given[0] == len(given) - 1 else 0  # apart from each other, they go to the front
    if axis.dim < start:
        return axis  # all dimensions before the first index are still there
    if axis.dim >= start + len(picked):
        others = [dim for dim in range(len(flow.source)) if dim not in given]
        return Axis(others[axis.dim - len(picked)], axis.inner)
    for dim in given:
        if axis.inner == 1 and flow.source[dim] == flow.samples:
            index = indices[dim]
            assert index is not None
            if _counts_along(index, axis.dim - start - len(picked), flow.samples):
                return Axis(dim)
    return None


def _counts_along(index: Tensor, dim: int, n: int) -> bool:
    """Whether an index is 0, 1, ..., n - 1 along a dimension, counted from the last, and alike along all others."""
    alone = index.dim() >= -dim and index.shape[dim] == n == index.numel()
    return alone and torch.equal(index.flatten(), torch.arange(n, device=index.device))


def _padded(flow: Flow, axis: Axis) -> Axis | None:
    untouched = len(flow.result) - len(flow.node._saved_pad) // 2  # type: ignore[attr-defined]
    return axis if axis.dim < untouched else None


def _dims(saved: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Dimensions as autograd saves them, perhaps negative and perhaps as unsigned numbers; None and () mean all."""
    dims = (saved,) if isinstance(saved, int) else tuple(saved or range(count))
    return tuple((dim - (1 << 64) if dim >= 1 << 63 else dim) % max(count, 1) for dim in dims)


_ELEMENTWISE = """
    Abs Add Addcdiv Addcmul Alias Atan Atan2 BinaryCrossEntropy BinaryCrossEntropyWithLogits Celu Clamp ClampMax
    ClampMin Clone Copysign Cos Cosh Div Elu Erf Erfc Exp Exp2 Expand Expm1 Fmax Fmin FusedDropout Gelu Hardshrink
    Hardsigmoid Hardswish Hardtanh HuberLoss LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit
    MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Pow PreluKernel Reciprocal Relu Rsqrt Rsub
    Sigmoid Silu Sin Sinc Sinh SmoothL1Loss SoftMarginLoss Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril
    Triu Where Xlogy
"""
_KINDS: tuple[tuple[Transfer, str], ...] = (
    (_elementwise, _ELEMENTWISE),
    (_same_elements, "View UnsafeView ReshapeAlias ReshapeCopy Squeeze Unsqueeze"),
    (_permuted, "Permute"),
    (_swapped, "Transpose T"),
    (_along_others(), "Cumsum Cumprod Cummax Cummin Gather Glu IndexSelect LogSoftmax Logcumsumexp MaskedSoftmax"),
    (_along_others(), "SafeSoftmax Softmax Sort Split SplitWithSizes Topk UnsafeSplit UnsafeSplitWithSizes"),
    (_along_others(), "FftC2C FftC2R FftR2C"),
    (_along_others("dims"), "Flip Roll"),
    (_concatenated, "Cat"),
    (_stacked, "Stack"),
    (_entry_of, "Select Unbind"),
    (_sliced, "Slice"),
    (_windows, "Unfold"),
    (_padded, "ConstantPadNd"),
    (_reduced, "Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nanmedian Nansum Norm"),
    (_reduced, "Prod Std StdMean Sum Var VarMean"),
    (_repeated, "Repeat"),
    (_all_but_last(1), "Linear ReflectionPad1D ReplicationPad1D UpsampleLinear1D UpsampleNearest1D"),
    (_all_but_last(1), "UpsampleNearestExact1D"),
    (_all_but_last(2), "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices MaxPool2D ReflectionPad2D"),
    (
        _all_but_last(2),
        "ReplicationPad2D UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D UpsampleNearestExact2D",
    ),
    (_all_but_last(3), "AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D MaxPool3DWithIndices PixelShuffle"),
    (_all_but_last(3), "PixelUnshuffle ReflectionPad3D ReplicationPad3D UpsampleNearest3D UpsampleNearestExact3D"),
    (_all_but_last(3), "UpsampleTrilinear3D"),
    (_first_dim, "ChannelShuffle Col2Im Convolution Im2Col NativeGroupNorm"),
    (_first_dims_of_both, "GridSampler2D GridSampler3D"),
    (_normalised_shape, "FusedRmsNorm NativeLayerNorm"),
    (_batch_norm, "BatchNormNoUpdate CudnnBatchNorm MiopenBatchNorm NativeBatchNorm NativeBatchNormLegit"),
    (_matrix_product(0, batched=False), "Mm"),
    (_matrix_product(1, batched=False), "Addmm"),
    (_matrix_product(0, batched=True), "Bmm"),
    (_matrix_product(1, batched=True), "Baddbmm"),
    (_vector_product(0), "Mv"),
    (_vector_product(1), "Addmv"),
    (_attention, "ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention"),
    (_attention, "ScaledDotProductFlashAttentionForCpu ScaledDotProductFusedAttentionOverrideable"),
    (_class_scores, "NllLoss NllLoss2D"),
    (_recurrent_layer, "MkldnnRnnLayer"),
    (_overwritten, "IndexAdd IndexCopy IndexFill IndexPut MaskedScatter Scatter ScatterAdd SelectScatter SliceScatter"),
    (_indexed, "Index"),
)
# PyTorch numbers the variants of a function: with a scalar instead of a tensor, in place, along dimensions or over all.
_TRANSFERS: dict[str, Transfer] = {
    f"{name}Backward{variant}": transfer for transfer, names in _KINDS for name in names.split() for variant in range(6)
} | {
    "AsStridedBackward1": _restrided,
    "CopyBackwards": _elementwise,
    "BackwardHookFunctionBackward": _hooked,
    "_FdcrRecursionBackward": _recursion,
}
