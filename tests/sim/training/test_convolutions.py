from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdcr_fast import _native
from fdcr_fast.sim.training import convolutions
from fdcr_fast.sim.training.classifier import classifier_of
from fdcr_fast.sim.training.convolutions import fast_convolutions
from fdcr_fast.sim.training.sgd import SGD

pytestmark = pytest.mark.skipif(not _native.loaded, reason=_native.reason)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of inputs that went through the operators."""
    shapes: list[torch.Size] = []
    own = convolutions.conv3x3

    def counted(input: Tensor, weight: Tensor) -> Tensor:
        shapes.append(input.shape)
        return own(input, weight)

    monkeypatch.setattr(convolutions, "conv3x3", counted)
    return shapes


def operands(*shape: int, outs: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return last(torch.randn(shape)), last(torch.randn(outs, shape[1], 3, 3) / 9), torch.randn(outs)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).norm() <= 2e-6 * expected.norm())


@pytest.mark.parametrize("contiguous", [None, 0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_and_gradients(taken: list[torch.Size], contiguous: int | None, biased: bool) -> None:
    given = [x.contiguous() if i == contiguous else x for i, x in enumerate(operands(6, 32, 9, 8)[: 2 + biased])]
    single, double = ([x.to(dtype).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64))
    with fast_convolutions():
        output = F.conv2d(*single, padding=1)
    expected = F.conv2d(*double, padding=1)
    assert len(taken) == 1
    assert close(output, expected)
    assert output.stride() == F.conv2d(*single, padding=1).stride()
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, single, grad)
    assert all(map(close, found, torch.autograd.grad(expected, double, grad.double())))


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_is_wanted_has_a_gradient(taken: list[torch.Size], frozen: int) -> None:
    given = [x.requires_grad_(i != frozen) for i, x in enumerate(operands(6, 32, 8, 8)[:2])]
    with fast_convolutions():
        F.conv2d(*given, padding=1).square().sum().backward()
    assert len(taken) == 1
    assert [x.grad is None for x in given] == [i == frozen for i in range(2)]


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "ReLU": nn.ReLU(inplace=True),
    "sum": lambda x: x.add_(1),
    "part": lambda x: x[:, 0].fill_(0),
    "resize": lambda x: x.unsqueeze_(0),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_can_be_changed_in_place(taken: list[torch.Size], change: str, biased: bool) -> None:
    single, double = (
        [x.to(dtype).requires_grad_() for x in operands(6, 32, 8, 8)[: 2 + biased]]
        for dtype in (torch.float32, torch.float64)
    )
    with fast_convolutions():
        output = F.conv2d(*single, padding=1)
    expected = F.conv2d(*double, padding=1)
    for x in (output, expected):
        IN_PLACE[change](x)
        x.square().sum().backward()
    assert len(taken) == 1
    assert close(output, expected)
    assert all(close(x.grad, y.grad) for x, y in zip(single, double, strict=True))  # type: ignore[arg-type]


class Marked(Tensor):
    """A tensor of a class of its own."""


X, W, B = operands(6, 32, 8, 8)
OTHERS: dict[str, Callable[[], Any]] = {
    "stride": lambda: F.conv2d(X, W, stride=2, padding=1),
    "no padding": lambda: F.conv2d(X, W),
    "padding of one dimension": lambda: F.conv2d(X, W, padding=(1, 0)),
    "padding by name": lambda: F.conv2d(X, W, padding="same"),
    "dilation": lambda: F.conv2d(X, W, padding=1, dilation=2),
    "groups": lambda: F.conv2d(torch.cat([X, X], 1), W, padding=1, groups=2),
    "5 by 5": lambda: F.conv2d(X, F.pad(W, [1, 1, 1, 1]), padding=2),
    "few channels": lambda: F.conv2d(X[:, :16], W[:, :16], padding=1),
    "few outputs": lambda: F.conv2d(X, W[:16], padding=1),
    "channels": lambda: F.conv2d(X.repeat(1, 2, 1, 1)[:, :40], W.repeat(1, 2, 1, 1)[:, :40], padding=1),
    "outputs": lambda: F.conv2d(X, torch.cat([W, W[:8]]), padding=1),
    "one image": lambda: F.conv2d(X[0], W, padding=1),
    "few tiles": lambda: F.conv2d(X[:3], W, padding=1),
    "small images": lambda: F.conv2d(X.reshape(96, 32, 2, 2), W, padding=1),
    "contiguous": lambda: F.conv2d(X.contiguous(), W.contiguous(), padding=1),
    "float64": lambda: F.conv2d(X.double(), W.double(), padding=1),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(F.conv2d)(X, W, padding=1),
    "vmap": lambda: torch.vmap(lambda w: F.conv2d(X, w, padding=1))(torch.stack([W, W + 1])),
    "func.grad": lambda: torch.func.grad(lambda w: F.conv2d(X, w, padding=1).sum())(W),
    "jvp": lambda: torch.func.jvp(lambda w: F.conv2d(X, w, padding=1), (W,), (W,)),
    "class of its own": lambda: F.conv2d(X.as_subclass(Marked), W, padding=1),
    "meta": lambda: F.conv2d(X.to("meta"), W.to("meta"), padding=1).shape,
    "complex": lambda: F.conv2d(X.to(torch.complex64), W.to(torch.complex64), padding=1),
    "another function": lambda: F.conv1d(X[0], W[:, :8, 0], padding=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_others_are_pytorchs(taken: list[torch.Size], name: str) -> None:
    expected = OTHERS[name]()
    with fast_convolutions():
        found = OTHERS[name]()
    assert not taken
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_forward_mode(taken: list[torch.Size]) -> None:
    with torch.autograd.forward_ad.dual_level(), fast_convolutions():
        dual = torch.autograd.forward_ad.make_dual(W, W)
        output = F.conv2d(X, dual, padding=1)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(output).tangent, F.conv2d(X, W, padding=1))
    assert not taken


def test_errors_are_pytorchs() -> None:
    def message() -> str:
        with pytest.raises(RuntimeError) as error:
            F.conv2d(X, torch.zeros(32, 48, 3, 3), padding=1)
        return str(error.value)

    expected = message()
    with fast_convolutions():
        assert message() == expected


@pytest.mark.parametrize("shape", [(1,), (32, 1), (1, 32), (33,)])
def test_no_bias_that_pytorch_refuses(shape: tuple[int, ...]) -> None:
    with fast_convolutions(), pytest.raises(RuntimeError, match="bias"):
        F.conv2d(X, W, torch.zeros(shape), padding=1)


def test_gradients_of_gradients(taken: list[torch.Size]) -> None:
    def penalty(x: Tensor, w: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(F.conv2d(x, w, padding=1).tanh().sum(), x, create_graph=True)
        return grad.square().sum()

    single, double = ([x.to(dtype).requires_grad_() for x in (X, W)] for dtype in (torch.float32, torch.float64))
    with fast_convolutions():
        found = torch.autograd.grad(penalty(*single), single)
    assert len(taken) == 1
    assert all(map(close, found, torch.autograd.grad(penalty(*double), double)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_recomputed_in_the_backward_pass(taken: list[torch.Size], reentrant: bool, biased: bool) -> None:
    layers = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=biased), nn.Conv2d(64, 32, 3, padding=1, bias=biased))
    twin = copy.deepcopy(layers).double()
    with fast_convolutions():
        output = checkpoint(layers, X.clone().requires_grad_(), use_reentrant=reentrant)
    output.square().sum().backward()
    twin(X.double()).square().sum().backward()
    assert len(taken) == 2
    for p, expected in zip(layers.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert expected.grad is not None
        assert close(p.grad, expected.grad)


def test_compiled_models(taken: list[torch.Size]) -> None:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    compiled = torch.compile(layer, backend="aot_eager")
    with fast_convolutions():
        output = compiled(X)
    assert not taken
    torch.testing.assert_close(output, layer(X))
    torch.compiler.reset()


class Block(nn.Module):
    """A user's layer, which calls a convolution by itself and has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3) / 17)
        self.out = nn.Linear(32, 4)
        self.register_forward_hook(_noted)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.conv2d(self.layers(x), self.weight, padding=(1, 1)).relu().mean((2, 3)))


CALLS: list[tuple[int, ...]] = []


def _noted(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    CALLS.append(tuple(output.shape))


def test_training_by_the_simulator(taken: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model = Block()
    twin, names = copy.deepcopy(model).double(), [sorted(vars(module)) for module in model.modules()]
    images, labels = torch.randn(40, 3, 8, 8), torch.randint(4, (40,))
    order = torch.arange(40)[None]
    tested = classifier_of(model)
    trained = tested.train(tested.params(), images, labels, order, SGD(16, 0.05, 0.9, 0))
    assert taken == [(16, 8, 8, 32), (16, 8, 8, 32), (8, 8, 8, 32)]
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for batch in order[0].split(16):
        optimizer.zero_grad()
        F.cross_entropy(twin(images[batch].double()), labels[batch]).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in twin.parameters()])
    assert (trained - expected).norm() < 1e-5 * expected.norm()
    assert [sorted(vars(module)) for module in model.modules()] == names
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == twin.state_dict().keys()
    assert CALLS == [(1, 4)] + [(16, 4), (16, 4), (8, 4)] * 2
    assert torch.equal(tested.logits(trained, images).argmax(1), tested.predict(trained, images))
