"""Squared per-sample gradients, summed over the samples: of linear layers, convolutions, norms and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast.ops.operator import BLOCK_ELEMENTS, check_floating, operator


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which gradients are multiplied and summed: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_linear(grad_output: Tensor, input: Tensor) -> None:
    check_floating(grad_output=grad_output, input=input)
    torch._check(
        grad_output.dim() == 3 and input.dim() == 3 and grad_output.shape[:2] == input.shape[:2],
        lambda: (
            f"expected grad_output [N, T, O] and input [N, T, I], got {tuple(grad_output.shape)} and "
            f"{tuple(input.shape)}"
        ),
    )


def _fake_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(grad_output, input)
    out = grad_output.shape[2]
    return input.new_empty(out, input.shape[2], dtype=dtype), input.new_empty(out, dtype=dtype)


@operator(check=_check_linear, fake=_fake_linear, gpu_kernels=("cuda", "triton"))
def sum_squared_grads_linear(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of a linear layer, summed over the samples.

    ``weight[o, i] = sum_n (sum_t grad_output[n, t, o] * input[n, t, i])^2``,
    ``bias[o] = sum_n (sum_t grad_output[n, t, o])^2``.

    Args:
        grad_output: ``[N, T, O]``, gradient of the loss at the layer's output.
        input: ``[N, T, I]``, the layer's input.

    Returns:
        ``(weight [O, I], bias [O])``, float64 if an argument is float64, else float32.
    """
    dtype = accumulation_dtype(grad_output, input)
    n, t, out_features = grad_output.shape
    in_features = input.shape[2]
    weight = torch.zeros(out_features, in_features, dtype=dtype, device=input.device)
    bias = torch.zeros(out_features, dtype=dtype, device=input.device)
    if t == 1:  # (g x)^2 = g^2 x^2: one matrix product for all samples
        g2, x2 = grad_output[:, 0].to(dtype).square(), input[:, 0].to(dtype).square()
        return g2.t() @ x2, g2.sum(0)
    for samples in _sample_blocks(n, max(out_features * in_features, t * (out_features + in_features))):
        g, x = grad_output[samples].to(dtype), input[samples].to(dtype)
        weight += torch.bmm(g.transpose(1, 2), x).square_().sum(0)
        bias += g.sum(1).square_().sum(0)
    return weight, bias


def _check_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_floating(grad_output=grad_output, input=input)
    dims = len(kernel_size)
    torch._check(
        1 <= dims <= 3 and len(stride) == len(padding) == len(dilation) == dims,
        lambda: f"expected 1 to 3 spatial dimensions, got kernel_size {list(kernel_size)}",
    )
    torch._check(
        min(*kernel_size, *stride, *dilation, groups) > 0 and min(padding) >= 0,
        lambda: "kernel_size, stride, dilation and groups must be positive, padding not negative",
    )
    torch._check(
        grad_output.dim() == input.dim() == dims + 2 and grad_output.shape[0] == input.shape[0],
        lambda: (
            f"expected grad_output [N, O, *output] and input [N, C, *size] with {dims} spatial dimensions, got "
            f"{tuple(grad_output.shape)} and {tuple(input.shape)}"
        ),
    )
    torch._check(
        grad_output.shape[1] % groups == 0 and input.shape[1] % groups == 0,
        lambda: f"groups = {groups} must divide {grad_output.shape[1]} and {input.shape[1]} channels",
    )
    expected = [
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in range(dims)
    ]
    torch._check(
        list(grad_output.shape[2:]) == expected,
        lambda: f"expected grad_output of spatial size {expected}, got {list(grad_output.shape[2:])}",
    )


def _fake_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(grad_output, input)
    out, columns = grad_output.shape[1], input.shape[1] // groups
    return input.new_empty(out, columns, *kernel_size, dtype=dtype), input.new_empty(out, dtype=dtype)


@operator(check=_check_conv, fake=_fake_conv, gpu_kernels=("cuda", "triton"))
def sum_squared_grads_conv(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of a 1-, 2- or 3-dimensional convolution, summed over the samples.

    ``weight[o, c, k] = sum_n (sum_s grad_output[n, o, s] * x[n, c, stride * s + dilation * k])^2`` with ``x`` the
    zero-padded channels of o's group, ``bias[o] = sum_n (sum_s grad_output[n, o, s])^2``.

    Args:
        grad_output: ``[N, O, *output]``, gradient of the loss at the layer's output.
        input: ``[N, C, *size]``, the layer's input.
        kernel_size: Its length is the number of spatial dimensions, 1 to 3.
        stride: One number per spatial dimension.
        padding: Zeros on both sides, one number per spatial dimension.
        dilation: One number per spatial dimension.
        groups: Divides both channel counts.

    Returns:
        ``(weight [O, C / groups, *kernel_size], bias [O])``, float64 if an argument is float64, else float32.
    """
    dtype = accumulation_dtype(grad_output, input)
    n, out_channels = grad_output.shape[:2]
    in_channels = input.shape[1]
    positions = grad_output.shape[2:].numel()
    columns = in_channels // groups * torch.Size(kernel_size).numel()
    weight = torch.zeros(groups, out_channels // groups, columns, dtype=dtype, device=input.device)
    bias = torch.zeros(out_channels, dtype=dtype, device=input.device)
    pad = [side for p in reversed(padding) for side in (p, p)]
    dims = len(kernel_size)
    for samples in _sample_blocks(n, groups * columns * (positions + out_channels // groups)):
        g = grad_output[samples].to(dtype)
        windows = F.pad(input[samples].to(dtype), pad)
        for d in range(dims):
            windows = windows.unfold(2 + d, (kernel_size[d] - 1) * dilation[d] + 1, stride[d])
            windows = windows[..., :: dilation[d]]
        # [n, C, *output, *kernel] -> [n, group, C / groups * kernel, output]
        order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
        x = windows.permute(order).reshape(len(g), groups, columns, positions)
        per_sample = g.reshape(len(g), groups, out_channels // groups, positions) @ x.transpose(2, 3)
        weight += per_sample.square_().sum(0)
        bias += g.flatten(2).sum(2).square_().sum(0)
    return weight.view(out_channels, in_channels // groups, *kernel_size), bias


def _check_norm(grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> None:
    check_floating(grad_output=grad_output, input=input)
    torch._check(
        grad_output.shape == input.shape and input.dim() == 5,
        lambda: (
            f"expected grad_output and input [N, T, G, C, S], got {tuple(grad_output.shape)} and {tuple(input.shape)}"
        ),
    )
    for name, given in (("mean", mean), ("variance", variance)):
        if given is not None:
            check_floating(**{name: given})
            message = f"expected {name} {tuple(input.shape[2:4])}, got {tuple(given.shape)}"
            torch._check(given.shape == input.shape[2:4], partial(str, message))


def _fake_norm(grad_output: Tensor, input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(grad_output, input)
    return input.new_empty(input.shape[2:4], dtype=dtype), input.new_empty(input.shape[2:4], dtype=dtype)


@operator(check=_check_norm, fake=_fake_norm, gpu_kernels=("triton",))
def sum_squared_grads_norm(
    grad_output: Tensor, input: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Squared per-sample gradients of the scale and shift of a norm layer, summed over the samples.

    ``weight[g, c] = sum_n (sum_ts grad_output[n, t, g, c, s] * (input[n, t, g, c, s] - m) / sqrt(v + eps))^2``,
    ``bias[g, c] = sum_n (sum_ts grad_output[n, t, g, c, s])^2``. The statistics ``m`` and ``v`` belong to ``(n, t, g)``
    and are taken over its channels and pixels, unless they are given.

    Args:
        grad_output: ``[N, T, G, C, S]``, gradient of the loss at the layer's output: ``T`` positions with statistics of
            their own, ``G`` groups of ``C`` channels, ``S`` pixels.
        input: ``[N, T, G, C, S]``, the layer's input.
        mean: ``m [G, C]``, or None for the mean of the input.
        variance: ``v [G, C]``, or None for the mean squared distance of the input from ``m``.
        eps: Added to ``v``.

    Returns:
        ``(weight [G, C], bias [G, C])``, float64 if ``grad_output`` or ``input`` is float64, else float32.
    """
    dtype = accumulation_dtype(grad_output, input)
    weight = torch.zeros(input.shape[2:4], dtype=dtype, device=input.device)
    bias = torch.zeros_like(weight)
    shared = (3, 4)
    for samples in _sample_blocks(len(input), input.shape[1:].numel()):
        g, x = grad_output[samples].to(dtype), input[samples].to(dtype)
        m = x.mean(shared, keepdim=True) if mean is None else mean.to(dtype)[..., None]
        v = (x - m).square().mean(shared, keepdim=True) if variance is None else variance.to(dtype)[..., None]
        weight += (g * (x - m) * (v + eps).rsqrt()).sum((1, 4)).square_().sum(0)
        bias += g.sum((1, 4)).square_().sum(0)
    return weight, bias


def _check_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> None:
    check_floating(grad_output=grad_output)
    torch._check(indices.dtype == torch.int64, lambda: f"indices must be int64, got {indices.dtype}")
    torch._check(
        grad_output.dim() == 3 and indices.shape == grad_output.shape[:2],
        lambda: (
            f"expected grad_output [N, T, D] and indices [N, T], got {tuple(grad_output.shape)} and "
            f"{tuple(indices.shape)}"
        ),
    )
    torch._check(num_embeddings >= 0, lambda: f"num_embeddings must not be negative, got {num_embeddings}")


def _fake_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    dtype = accumulation_dtype(grad_output)
    return grad_output.new_empty(num_embeddings, grad_output.shape[2], dtype=dtype)


@operator(check=_check_embedding, fake=_fake_embedding, gpu_kernels=("triton",))
def sum_squared_grads_embedding(grad_output: Tensor, indices: Tensor, num_embeddings: int) -> Tensor:
    """Squared per-sample gradients of an embedding table, summed over the samples.

    ``result[v] = sum_n (sum_{t: indices[n, t] = v} grad_output[n, t])^2``. The work grows with ``N * T + V``.

    Args:
        grad_output: ``[N, T, D]``, gradient of the loss at the looked up rows.
        indices: ``[N, T]`` int64, less than ``num_embeddings``; negative ones are skipped.
        num_embeddings: ``V``.

    Returns:
        ``[V, D]``, float64 if ``grad_output`` is float64, else float32.
    """
    dtype = accumulation_dtype(grad_output)
    width = grad_output.shape[2]
    result = torch.zeros(num_embeddings, width, dtype=dtype, device=grad_output.device)
    for samples in _sample_blocks(len(indices), indices.shape[1] * width):
        sample, token = (indices[samples] >= 0).nonzero(as_tuple=True)
        row = indices[samples][sample, token]
        # Equal tokens of one sample are one pair (row, sample), whose gradient is the sum of theirs.
        pairs, pair = (row * len(indices) + sample).unique(return_inverse=True)
        sums = result.new_zeros(len(pairs), width)
        sums.index_add_(0, pair, grad_output[samples][sample, token].to(dtype))
        result.index_add_(0, pairs // len(indices), sums.square_())
    return result


def _sample_blocks(n: int, elements_per_sample: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, elements_per_sample))
    return (slice(i, i + step) for i in range(0, n, step))
