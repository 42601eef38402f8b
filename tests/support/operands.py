"""Random operands with awkward layouts, and the meaning of the operators in naive float64."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def laid_out(x, layout):
    """The same values with other strides: transposed, with a gap between elements, or offset within a larger buffer."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gapped":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        padded = F.pad(x, (1, 2) * x.dim(), value=torch.nan)
        return padded[tuple(slice(1, 1 + n) for n in x.shape)]
    if layout == "channels_last" and x.dim() >= 3:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


layouts = st.sampled_from(["contiguous", "transposed", "gapped", "offset", "channels_last"])


@st.composite
def tensors(draw, shape, dtype=None):
    dtype = dtype or draw(st.sampled_from(FLOATS))
    seed = draw(st.integers(0, 2**31))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return laid_out(x.to(dtype), draw(layouts))


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    n = draw(st.integers(0, 5))
    channels = groups * draw(st.integers(1, 7)), groups * draw(st.integers(1, 19))
    small = [st.integers(1, 3)] * dims
    kernel, stride, dilation = (draw(st.tuples(*small)) for _ in range(3))
    padding = draw(st.tuples(*[st.integers(0, 3)] * dims))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, r - 2 * p) + draw(st.integers(0, 8)) for r, p in zip(reach, padding, strict=True)]
    out = [(s + 2 * p - r) // st_ + 1 for s, p, r, st_ in zip(size, padding, reach, stride, strict=True)]
    input = draw(tensors((n, channels[0], *size)))
    grad = draw(tensors((n, channels[1], *out)))
    return grad, input, kernel, stride, padding, dilation, groups


def conv_one_by_one(grad, input, kernel, stride, padding, dilation, groups):
    """Autograd on one sample at a time, in float64."""
    dims = len(kernel)
    weight = torch.zeros(grad.shape[1], input.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True)
    sums = [torch.zeros_like(weight), torch.zeros_like(bias)]
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    for g, x in zip(grad.double(), input.double(), strict=True):
        out = conv(x[None], weight, bias, stride, padding, dilation, groups)
        for total, d in zip(sums, torch.autograd.grad(out, (weight, bias), g[None]), strict=True):
            total += d**2
    return tuple(t.detach() for t in sums)


def linear_one_by_one(grad, input):
    weight = torch.zeros(grad.shape[2], input.shape[2], dtype=torch.float64)
    bias = torch.zeros(grad.shape[2], dtype=torch.float64)
    for g, x in zip(grad.double(), input.double(), strict=True):
        weight += (g.T @ x) ** 2
        bias += g.sum(0) ** 2
    return weight, bias


@st.composite
def client_matrices(draw, max_clients=6, max_params=3000):
    """(updates, fishers, num_params) as tiled client matrices, the padding poisoned with NaN."""
    K = draw(st.integers(1, max_clients))
    P = draw(st.integers(1, max_params))
    L = draw(st.sampled_from([P, max(1, P // 2), max(1, P // 3), P + 5, 256]))
    T = -(-P // L)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrices = []
    for make in (torch.randn, torch.rand):
        flat = torch.full((K, T * L), torch.nan, dtype=torch.float64)
        flat[:, :P] = make(K, P, generator=generator, dtype=torch.float64)
        tiled = flat.view(K, T, L).transpose(0, 1).to(draw(st.sampled_from(FLOATS)))
        matrices.append(laid_out(tiled, draw(layouts)))
    return *matrices, P


def rows(tiled, num_params):
    """[K, P] in float64 numpy."""
    return tiled.double().transpose(0, 1).reshape(tiled.shape[1], -1)[:, :num_params].numpy()


def relative_error(got, expected):
    got, expected = (np.asarray(x, dtype=np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300)


NOTHING = torch.tensor([0.0, math.inf, -math.inf], dtype=torch.float64)  # statistics of no numbers


@st.composite
def vectors(draw):
    """Pieces of one vector, an empty row for it, and how it is laid out."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4))
    scale = draw(st.sampled_from([1.0, 1e-6, 1e4]))
    pieces = [
        laid_out(
            (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(draw(st.sampled_from(FLOATS))),
            draw(st.sampled_from(["contiguous", "gapped", "offset"])),
        )
        for n in sizes
    ]
    pieces = [x.view(2, len(x) // 2) if len(x) % 2 == 0 and x.is_contiguous() else x for x in pieces]
    P = sum(sizes)
    L = draw(st.sampled_from([max(P, 1), max(P // 3, 1), P + 5, 1, 16, 64, 2048, 2500]))
    dtype = draw(st.sampled_from(FLOATS))
    store = torch.full((max(-(-P // L), 1), 3, 2, L), torch.nan, dtype=dtype)
    row = store[:, 1, draw(st.integers(0, 1))]
    if draw(st.booleans()):
        row = torch.full((row.shape[1], row.shape[0]), torch.nan, dtype=dtype).t()
    return pieces, row
