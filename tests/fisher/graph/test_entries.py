"""Parameters outside of layers that have rules, without ``vmap``, against one sample at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one

N, T, D = 5, 3, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Entering(nn.Module):
    """Something between two layers that takes parameters of its own."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.given = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.first, self.head = nn.Linear(D, D), nn.LazyLinear(3)
        with torch.no_grad():
            self(torch.zeros(1, T, D))
        self.double()

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.function(h, *self.given)).flatten(1))


def conv1d_of_gpt2(h, weight, bias):
    return torch.addmm(bias, h.view(-1, D), weight).view(*h.shape[:-1], -1)


def time_first(h, position):
    return (h.transpose(0, 1) + position).transpose(0, 1)


def class_token(h, token):
    return torch.cat([token.expand(len(h), -1, -1), h], 1)


def packed(h, weight, bias):
    q, k, v = F.linear(h, weight, bias).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


def not_contiguous(h, weight, bias):
    return F.linear(h.transpose(0, 1), weight, bias).transpose(0, 1)


def of_running_statistics(h, weight, bias):
    mean, variance = torch.linspace(-1, 1, T).to(h), torch.linspace(0.5, 2, T).to(h)
    return F.batch_norm(h, mean, variance, weight, bias)


# What is done with h [N, T, D], and the shapes of the parameters.
FUNCTIONS = {
    "position": (lambda h, p: h + p, (1, T, D)),
    "position without batch": (lambda h, p: p + h, (T, D)),
    "position, time first": (time_first, (T, 1, D)),
    "bias of features": (lambda h, p: h + p, (D,)),
    "bias": (lambda h, p: h + p, ()),
    "difference": (lambda h, p: h - p, (T, 1)),
    "difference, reversed": (lambda h, p: p - h, (T, D)),
    "scaled term": (lambda h, p: torch.add(h, p, alpha=3), (D,)),
    "scaled difference": (lambda h, p: torch.sub(h, p, alpha=-0.5), (D,)),
    "scale": (lambda h, p: h * p, (D,)),
    "scale, reversed": (lambda h, p: p * h, (T, D)),
    "scale of channels": (lambda h, p: h.unflatten(2, (2, 2)) * p, (T, 1, 1)),
    "one scale": (lambda h, p: h * p, ()),
    "scale and shift": (lambda h, p, q: h * p + q, (D,), (T, D)),
    "scaled in place": (lambda h, p, q: h.clone().mul_(p).add_(q), (D,), (D,)),
    "class token": (class_token, (1, 1, D)),
    "class token of one dimension": (lambda h, p: torch.cat([h, p.expand(len(h), 1, D)], 1), (D,)),
    "class token, unsqueezed": (lambda h, p: torch.cat([h, p[None, None].expand(len(h), -1, -1)], 1), (D,)),
    "expanded terms": (lambda h, p: h + p.expand_as(h), (T, 1)),
    "linear": (F.linear, (6, D), (6,)),
    "linear without bias": (F.linear, (6, D)),
    "packed projections": (packed, (3 * D, D), (3 * D,)),
    "linear of what is not contiguous": (not_contiguous, (6, D), (6,)),
    "linear of features": (lambda h, p, q: F.linear(h.flatten(1), p, q), (6, T * D), (6,)),
    "matrix": (lambda h, p: h @ p, (D, 6)),
    "transposed matrix": (lambda h, p: h @ p.transpose(-2, -1), (6, D)),
    "permuted matrix": (lambda h, p: h.flatten(1) @ p.permute(2, 0, 1).reshape(T * D, 2), (T, 2, D)),
    "reshaped matrix": (lambda h, p: h @ p.view(D, 6), (2, 2, 6)),
    "squeezed matrix": (lambda h, p: h @ p.squeeze(), (1, D, 1, 6)),
    "GPT-2's": (conv1d_of_gpt2, (D, 6), (6,)),
    "addmm with factors": (lambda h, p: torch.addmm(p, h.flatten(1), torch.ones(T * D, 6).to(h), beta=2.5), (6,)),
    "layer norm": (lambda h, p, q: F.layer_norm(h, (D,), p, q), (D,), (D,)),
    "layer norm of two dimensions": (lambda h, p: F.layer_norm(h, (T, D), p), (T, D)),
    "batch norm": (of_running_statistics, (T,), (T,)),
    "PReLU": (F.prelu, (1,)),
    "PReLU of channels": (F.prelu, (T,)),
    "RMS norm": (lambda h, p: h * h.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * p, (D,)),
    "windows": (lambda h, p: (h.view(-1, 2, 2) + p).view(h.shape), (2, 2)),
    "merged": (lambda h, p: (h.flatten(0, 1) * p).view(h.shape), (D,)),
}


def made(name):
    function, *shapes = FUNCTIONS[name]
    return Entering(function, *shapes)


@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_vmap(name, n, monkeypatch):
    model = made(name)
    x, y = torch.randn(n, T, D).double(), torch.randint(0, 3, (n,))
    expected = fisher_one_by_one(model, x, y)
    monkeypatch.setattr(PerSampleGradients, "sum_squares", None)
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check="off"), expected)


# A parameter of which the graph does not tell that the samples are apart in what it enters.
APART = {
    "repeated": lambda h, p: torch.cat([h, p.repeat(len(h), 2, 1)], 1),
    "of all samples": lambda h, p: h + (p * 2),
    "used twice": lambda h, p: h * p + p,
    "squared": lambda h, p: h + p * p,
    "its own factor": lambda h, p: h * (p * p.detach()),
    "in another sample's row": lambda h, p: (h.flip(0) * p).flip(0),
    "exponential": lambda h, p: h * p.exp(),
    "rows of parameters": lambda h, p: h + (torch.arange(D).to(h)[:, None] * p).sum(0),
    "left factor": lambda h, p: torch.einsum("ij,njk->nik", p.view(1, D).expand(T, D)[:, :T], h),
}


@pytest.mark.parametrize("n", [1, 2, T, N])
@pytest.mark.parametrize("name", APART)
def test_others_are_exact_as_well(name, n):
    model = Entering(APART[name], (D,))
    x, y = torch.randn(n, T, D).double(), torch.randint(0, 3, (n,))
    expected = fisher_one_by_one(model, x, y)
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check="off"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["position", "scale", "linear", "GPT-2's", "layer norm", "class token"])
def test_half_precision_and_autocast(name, dtype, monkeypatch):
    model = made(name)
    x, y = torch.randn(20, T, D).double(), torch.randint(0, 3, (20,))
    expected = fisher_one_by_one(model, x, y)
    monkeypatch.setattr(PerSampleGradients, "sum_squares", None)
    with torch.autocast("cpu", dtype=dtype):
        mixed = diagonal_fisher(model.float(), (x.float(), y), check="off")
    half = diagonal_fisher(model.to(dtype), (x.to(dtype), y), check="off")
    for fisher in (mixed, half):
        assert fisher.dtype == torch.float32
        assert (fisher - expected).norm() < 8 * math.sqrt(torch.finfo(dtype).eps * 1e-3) * expected.norm() + 1e-12


def test_what_is_changed_after_it_was_read():
    """Like plain autograd, it must not take the changed values."""
    model = Entering(lambda h, p: _changed(h * p, h), (D,))
    x, y = torch.randn(N, T, D).double(), torch.randint(0, 3, (N,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        diagonal_fisher(model, (x, y))


def _changed(result, h):
    h.add_(1)
    return result
