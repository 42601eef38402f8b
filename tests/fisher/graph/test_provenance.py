"""Where the graph says that the samples lie in a tensor, against the gradient of every sample's loss by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from fdcr_fast.fisher.graph.autograd import Graph
from fdcr_fast.fisher.graph.gradients import RowsOfSamples
from fdcr_fast.fisher.graph.provenance import Axis

N = 6


def samples_last(x):
    return x.movedim(0, -1)


def windows(x):
    """As in Swin: positions beside each other become a sample of their own."""
    n, h, w, c = x.shape
    return x.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)


def back(x):
    return x.view(N, 2, 2, 2, 2, -1).transpose(2, 3).reshape(N, 4, 4, -1)


# Name: the shape of the tensor that is asked about, its axis of samples, and the way from it to the losses [N].
WAYS = {
    "elementwise": ((N, 4), Axis(0), lambda x: (torch.tanh(x) * 2 + torch.randn(4)).sum(1)),
    "broadcast": ((N, 1, 4), Axis(0), lambda x: (x + torch.randn(N, 3, 4)).relu().mean((1, 2))),
    "missing dimension": ((4, N), Axis(1), lambda x: (x * torch.randn(3, 4, N)).amax((0, 1))),
    "merged": ((N * 3, 4), Axis(0, 3), lambda x: x.view(N, 3, 4).sum((1, 2))),
    "merged, positions first": ((3 * N, 4), Axis(0), lambda x: x.view(3, N, 4).sum((0, 2))),
    "merged in the middle": ((2, N * 3, 4), Axis(1, 3), lambda x: x.unflatten(1, (N, 3)).pow(2).sum((0, 2, 3))),
    "split again": (
        (N, 2, 3),
        Axis(0),
        lambda x: x.flatten().view(N * 2, 3).flatten(0, -1).unflatten(0, (N, 6)).sum(1),
    ),
    "squeezed": ((1, N, 1, 4), Axis(1), lambda x: x.squeeze().unsqueeze(1).sum((1, 2))),
    "permuted": ((2, 3, N), Axis(2), lambda x: x.permute(2, 0, 1).sum((1, 2))),
    "transposed": ((4, N), Axis(1), lambda x: x.t().sum(1)),
    "transposed, negative": ((4, N), Axis(1), lambda x: x.transpose(-1, -2).logsumexp(-1)),
    "windows": ((N, 4, 4, 3), Axis(0), lambda x: back(windows(x).softmax(1)).sum((1, 2, 3))),
    "in windows": ((N * 4, 4, 3), Axis(0, 4), lambda x: back(x.softmax(1)).sum((1, 2, 3))),
    "shifted windows": ((N, 4, 4, 3), Axis(0), lambda x: back(windows(x.roll((1, -1), (1, 2)))).sum((1, 2, 3))),
    "softmax": ((N, 4), Axis(0), lambda x: x.softmax(-1)[:, 0]),
    "cumulative sum": ((4, N), Axis(1), lambda x: x.cumsum(0).prod(0)),
    "sorted": ((N, 4), Axis(0), lambda x: x.sort(1).values[:, 1]),
    "largest": ((N, 4), Axis(0), lambda x: x.topk(2, 1).values.std(1)),
    "gathered": ((N, 4), Axis(0), lambda x: x.gather(1, torch.randint(4, (N, 2))).norm(dim=1)),
    "chosen positions": ((N, 4), Axis(0), lambda x: x.index_select(1, torch.tensor([3, 1])).sum(1)),
    "flipped": ((N, 4), Axis(0), lambda x: (x.flip(1) * torch.randn(4)).sum(1)),
    "gated": ((N, 4), Axis(0), lambda x: F.glu(x, 1).sum(1)),
    "concatenated": ((N, 4), Axis(0), lambda x: torch.cat([x, x.exp(), torch.randn(N, 1)], 1).sum(1)),
    "stacked": ((N, 4), Axis(0), lambda x: torch.stack([x, x.exp()], -2).sum((1, 2))),
    "stacked in front": ((N, 4), Axis(0), lambda x: torch.stack([x, x.exp()]).sum((0, 2))),
    "selected": ((N, 4, 3), Axis(0), lambda x: x[:, 1, -1]),
    "selected before": ((3, N, 4), Axis(1), lambda x: x[-1].sum(1)),
    "sliced": ((N, 4), Axis(0), lambda x: x[:, 1:3].sum(1)),
    "unbound": ((3, N), Axis(1), lambda x: sum(a * i for i, a in enumerate(x.unbind(), 1))),
    "split": ((N, 5), Axis(0), lambda x: torch.stack([a.sum(1) for a in x.split([1, 3, 1], 1)]).sum(0)),
    "chunked": ((N, 4), Axis(0), lambda x: x.chunk(2, 1)[1].sum(1)),
    "windows of a signal": ((N, 5), Axis(0), lambda x: x.unfold(1, 3, 1).sin().sum((1, 2))),
    "padded": ((N, 4), Axis(0), lambda x: F.pad(x, (1, 2)).sum(1)),
    "padded by reflection": ((N, 2, 4), Axis(0), lambda x: F.pad(x, (1, 2), "reflect").sum((1, 2))),
    "repeated": ((N, 2), Axis(0), lambda x: x.repeat(1, 3).sum(1)),
    "repeated, positions first": ((N, 2), Axis(0), lambda x: x.repeat(3, 1).view(3, N, 2).sum((0, 2))),
    "expanded": ((N, 1), Axis(0), lambda x: x.expand(N, 3).sum(1)),
    "kept dimensions": ((N, 4, 2), Axis(0), lambda x: x.mean(1, keepdim=True).flatten(1).var(1)),
    "pooled": ((N, 2, 4, 4), Axis(0), lambda x: F.max_pool2d(x, 2).sum((1, 2, 3))),
    "pooled, one channel each": ((2, N, 4, 4), Axis(1), lambda x: F.avg_pool2d(x, 2).sum((0, 2, 3))),
    "pooled to one": ((N, 2, 4, 4), Axis(0), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1).sum(1)),
    "pooled signal": ((N, 2, 4), Axis(0), lambda x: F.max_pool1d(x, 2).sum((1, 2))),
    "enlarged": ((N, 2, 4), Axis(0), lambda x: F.interpolate(x, scale_factor=2, mode="linear").sum((1, 2))),
    "shuffled pixels": ((N, 4, 2, 2), Axis(0), lambda x: F.pixel_shuffle(x, 2).sum((1, 2, 3))),
    "convolved": ((N, 2, 4, 4), Axis(0), lambda x: nn.Conv2d(2, 3, 2)(x).tanh().sum((1, 2, 3))),
    "convolved frames": (
        (N * 2, 2, 5),
        Axis(0, 2),
        lambda x: nn.Conv1d(2, 3, 2)(x).view(N, 2, 3, 4).tanh().sum((1, 2, 3)),
    ),
    "patches": ((N, 2, 4, 4), Axis(0), lambda x: F.unfold(x, 2).tanh().sum((1, 2))),
    "linear": ((N, 4), Axis(0), lambda x: nn.Linear(4, 3)(x).tanh().sum(1)),
    "linear of positions": ((N, 3, 4), Axis(0), lambda x: nn.Linear(4, 3)(x).tanh().sum((1, 2))),
    "linear, positions first": ((3, N, 4), Axis(1), lambda x: nn.Linear(4, 3, bias=False)(x).tanh().sum((0, 2))),
    "from the left": ((4, N), Axis(1), lambda x: (torch.randn(3, 4) @ x).tanh().sum(0)),
    "times a vector": ((N, 4), Axis(0), lambda x: x @ torch.randn(4)),
    "einsum": ((N, 4, 2), Axis(0), lambda x: torch.einsum("nij,kj,i->nk", x, torch.randn(3, 2), torch.randn(4)).sum(1)),
    "layer norm": ((N, 3, 4), Axis(0), lambda x: (nn.LayerNorm(4)(x) * torch.randn(4)).sum((1, 2))),
    "group norm": ((N, 4, 3), Axis(0), lambda x: (nn.GroupNorm(2, 4)(x) * torch.randn(4, 3)).sum((1, 2))),
    "instance norm": ((N, 4, 3), Axis(0), lambda x: (nn.InstanceNorm1d(4)(x) * torch.randn(4, 3)).sum((1, 2))),
    "batch norm, running": ((N, 4), Axis(0), lambda x: nn.BatchNorm1d(4).eval()(x).tanh().sum(1)),
    "attention": ((N, 2, 3, 4), Axis(0), lambda x: F.scaled_dot_product_attention(x, x.tanh(), x).sum((1, 2, 3))),
    "attention with mask": (
        (N, 2, 3, 4),
        Axis(0),
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.rand(N, 1, 3, 3) > 0.3).nansum((1, 2, 3)),
    ),
    "self-attention": (
        (N, 3, 4),
        Axis(0),
        lambda x: nn.MultiheadAttention(4, 2, batch_first=True)(x, x, x)[0].sum((1, 2)),
    ),
    "self-attention, positions first": (
        (3, N, 4),
        Axis(1),
        lambda x: nn.MultiheadAttention(4, 2)(x, x, x)[0].sum((0, 2)),
    ),
    "LSTM": ((N, 3, 4), Axis(0), lambda x: nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)(x)[0].sum((1, 2))),
    "last state": ((3, N, 4), Axis(1), lambda x: nn.LSTM(4, 5)(x)[1][0][0].sum(1)),
    "GRU": ((N, 3, 4), Axis(0), lambda x: nn.GRU(4, 5, batch_first=True)(x)[0][:, -1].sum(1)),
    "cross entropy": ((N, 4), Axis(0), lambda x: F.cross_entropy(x, torch.randint(4, (N,)), reduction="none")),
    "dense cross entropy": (
        (N, 4, 3, 3),
        Axis(0),
        lambda x: F.cross_entropy(x, torch.randint(4, (N, 3, 3)), reduction="none").sum((1, 2)),
    ),
    "cross entropy of tokens": (
        (N, 3, 4),
        Axis(0),
        lambda x: F.cross_entropy(x.flatten(0, 1), torch.randint(4, (N * 3,)), reduction="none").view(N, 3).sum(1),
    ),
    "soft labels": ((N, 4), Axis(0), lambda x: F.cross_entropy(x, torch.rand(N, 4), reduction="none")),
    "squared error": ((N, 4), Axis(0), lambda x: F.mse_loss(x, torch.randn(N, 4), reduction="none").sum(1)),
    "masked": ((N, 4), Axis(0), lambda x: torch.where(torch.rand(N, 4) > 0.5, x, x.exp()).masked_fill(x > 1, 0).sum(1)),
    "one position of each": ((N, 4, 3), Axis(0), lambda x: x[torch.arange(N), torch.randint(4, (N,))].sum(1)),
    "one position of each, first": ((4, N, 3), Axis(1), lambda x: x[torch.randint(4, (N,)), torch.arange(N)].sum(1)),
    "some positions of each": (
        (N, 4, 3),
        Axis(0),
        lambda x: x[torch.arange(N)[:, None], torch.randint(4, (N, 2))].sum((1, 2)),
    ),
    "positions by number": ((N, 4, 3), Axis(0), lambda x: x[:, torch.tensor([2, 0, 0])].sum((1, 2))),
    "positions apart": ((N, 4, 3, 2), Axis(0), lambda x: x[:, [1, 2], :, [0, 1]].sum((0, 2))),
    "put": (
        (N, 4),
        Axis(0),
        lambda x: (x * 1).index_put((torch.tensor([0]), torch.tensor([1])), torch.zeros(1)).sum(1),
    ),
    "samples in the end": ((N, 3, 4), Axis(0), lambda x: samples_last(x).amax((0, 1))),
    "hooked module": ((N, 4), Axis(0), lambda x: _hooked()(x).sum(1)),
    "in half precision": ((N, 4), Axis(0), lambda x: x.half().float().sum(1)),
    "used twice": ((N, 4), Axis(0), lambda x: x.exp().sum(1) * x.flip(1).sum(1)),
}

# What the graph must not claim to know: rows of other samples, of several, or chosen by their values.
OTHERWISE = {
    "shared by all": ((3, 4), lambda x: (torch.randn(N, 3, 4) + x).sum((1, 2))),
    "as many as samples": ((N, 4), lambda x: (torch.randn(N, N) @ x).tanh().sum(1)),
    "weight": ((4, N), lambda x: (torch.randn(N, 4) @ x).tanh().sum(1)),
    "queries of parameters": ((N, 4), lambda x: (torch.randn(N, 3, 4) @ x.t()).softmax(-1).square().sum((1, 2))),
    "other order": ((N, 4), lambda x: x[torch.tensor([5, 0, 1, 2, 3, 4])].sum(1)),
    "flipped": ((N, 4), lambda x: x.flip(0).sum(1)),
    "rolled": ((N, 4), lambda x: x.roll(1, 0).sum(1)),
    "sorted": ((N, 4), lambda x: x.sort(0).values.sum(1)),
    "masked": ((N, 4), lambda x: torch.zeros(N, 2, 4).masked_scatter(_two_of_one_sample(), x).square().sum((1, 2))),
    "tokens put back": (
        (N, 4),
        lambda x: torch.zeros(N, 2, 4).index_put(_two_of_one_sample()[..., 0].nonzero(as_tuple=True), x).sum((1, 2)),
    ),
    "across samples": ((N, 4), lambda x: x.softmax(0).square().sum(1)),
    "two orders": ((N, 4), lambda x: x.sum(1) + x.flip(0).sum(1)),
    "padded and cut": ((N, 4), lambda x: F.pad(x, (0, 0, 1, -1)).sum(1)),
    "part of the samples": ((2 * N, 4), lambda x: x[N:].sum(1)),
    "unequal parts": ((N + 6, 4), lambda x: torch.cat([x[:3], x[9:]]).sum(1)),
    "spread over two dimensions": ((2, 3, 4), lambda x: x.reshape(N, 4).sum(1)),
    "written to a part in place": ((N, 4), lambda x: _written_to(x).flip(0).sum(1)),
    "custom function": ((N, 4), lambda x: _Rolled.apply(x).sum(1)),
    "windows along samples": ((N + 2, 4), lambda x: x.unfold(0, 3, 1).sum((1, 2))),
}


def _two_of_one_sample():
    mask = torch.tensor([[1, 1], [0, 1], [0, 1], [1, 0], [1, 0], [0, 0]]).bool()
    return mask[..., None].expand(N, 2, 4)


def _hooked():
    module = nn.Sequential(nn.Tanh())
    module.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return module


def _written_to(x):
    y = x * 1
    y[..., 0] = 0
    return y


class _Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.roll(1, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad.roll(-1, 0)


def follow(shape, way):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True) * 1
    edge = get_gradient_edge(x)
    losses = way(x)
    assert losses.shape == (N,)
    grads = torch.stack([torch.autograd.grad(loss, edge, retain_graph=True)[0] for loss in losses])
    return Graph(losses), losses, edge, grads


def lies_along(grads, axis):
    """Whether gradients [N, *shape] of the samples' losses are 0 but for the samples' own entries."""
    entries = torch.arange(grads.shape[1 + axis.dim]) // axis.inner % N
    others = entries != torch.arange(N)[:, None]
    return not grads.movedim(1 + axis.dim, 1)[others].any()


@pytest.mark.parametrize("name", WAYS)
def test_samples_are_found(name):
    shape, axis, way = WAYS[name]
    graph, _, edge, grads = follow(shape, way)
    assert lies_along(grads, axis), "the test is wrong"
    assert graph.axes({"x": edge}) == {"x": axis}


@pytest.mark.parametrize("name", OTHERWISE)
def test_nothing_is_claimed(name):
    graph, losses, edge, grads = follow(*OTHERWISE[name])
    assert graph.axes({"x": edge}) == {}
    if grads.shape[1] == N:
        rows = RowsOfSamples(losses, {"x": edge}, ["x"])
        assert rows.are_in("x", grads.sum(0)) == lies_along(grads, Axis(0)) is False


@pytest.mark.parametrize("n", [1, 2, 64, 65, 200])
def test_gradients_show_rows_of_samples(n):
    """With more samples than weights in one pass, too."""
    torch.manual_seed(0)
    x = torch.randn(n, 3, requires_grad=True) * 1
    edge = get_gradient_edge(x)
    confident = (x * 40).log_softmax(1)[:, 0]  # gradients are differences of nearly equal numbers
    for order in (
        torch.arange(n),
        torch.arange(n).roll(1),
        torch.arange(n).index_copy(0, torch.tensor([0]), torch.tensor([n - 1])),
    ):
        losses = confident[order] * 2
        (grad,) = torch.autograd.grad(losses.sum(), edge, retain_graph=True)
        shown = RowsOfSamples(losses, {"x": edge}, ["x"]).are_in("x", grad)
        assert shown == bool(torch.equal(order, torch.arange(n)))
