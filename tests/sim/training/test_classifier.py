from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fdcr_fast import _native, diagonal_fisher
from fdcr_fast.sim.training import classifier
from fdcr_fast.sim.training.classifier import Classifier, classifier_of
from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.sgd import SGD, shuffled


@pytest.fixture(params=["operators", "autograd"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the model is differentiated."""
    if request.param == "autograd":
        monkeypatch.setattr(classifier, "network_layers", lambda model: None)
    elif not _native.loaded:
        pytest.skip(_native.reason)
    return str(request.param)


def made(model: nn.Module, way: str) -> Classifier:
    tested = classifier_of(model)
    assert isinstance(tested, classifier.NetworkClassifier) == (way == "operators")
    return tested


@pytest.mark.parametrize(
    ("shape", "classes", "batch_size"),
    [((1, 16, 16), 4, 16), ((3, 18, 16), 100, 64), ((1, 8, 8), 2, 16), ((1, 8, 8), 10, 1)],
)
def test_training_is_plain_sgd_with_momentum(
    way: str, shape: tuple[int, int, int], classes: int, batch_size: int
) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(50, *shape), torch.randint(0, classes, (50,))
    rows = torch.arange(3, 40)
    reference = build_model("auto", shape, classes, seed=0).double()
    tested = made(build_model("auto", shape, classes, seed=0), way)
    lr, momentum, decay = 0.05, 0.9, 1e-2
    given = tested.params()
    order = shuffled(rows, 2, torch.Generator().manual_seed(7))
    trained = tested.train(given, images, labels, order, SGD(batch_size, lr, momentum, decay))

    generator = torch.Generator().manual_seed(7)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for _ in range(2):
        order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            log_p = reference(images[batch].double()).log_softmax(1)
            loss = -sum(log_p[i, labels[row]] for i, row in enumerate(batch)) / len(batch)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            with torch.no_grad():
                for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                    v.mul_(momentum).add_(g + decay * p)
                    p.sub_(lr * v)
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    assert (trained.double() - expected).norm() < 1e-5 * expected.norm()
    untouched = torch.cat([p.detach().flatten() for p in build_model("auto", shape, classes, seed=0).parameters()])
    assert torch.equal(given, untouched)


def test_parameters_survive_loading() -> None:
    tested = classifier_of(build_model("cnn", (1, 16, 16), 3, seed=0))
    params = torch.randn(tested.layout.numel)
    tested.load(params)
    assert torch.equal(tested.params(), params)
    plain = copy.deepcopy(tested.model)
    offset = 0
    for parameter in plain.parameters():
        values = params[offset : offset + parameter.numel()].reshape(parameter.shape)
        assert torch.equal(parameter, values)
        offset += parameter.numel()


def test_fisher_squares_per_sample(way: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(20, 1, 16, 16), torch.randint(0, 3, (20,))
    rows = torch.tensor([1, 4, 7, 19])
    tested = made(build_model("cnn", (1, 16, 16), 3, seed=0), way)
    model = copy.deepcopy(tested.model).double()
    expected = torch.zeros(tested.layout.numel, dtype=torch.float64)
    for row in rows.tolist():
        log_p = model(images[row : row + 1].double()).log_softmax(1)[0, labels[row]]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(log_p, list(model.parameters()))])
        expected += gradient**2 / len(rows)
    fisher = tested.fisher(tested.params(), images, labels, rows)
    assert fisher.dtype == torch.float32
    assert (fisher.double() - expected).norm() < 1e-5 * expected.norm()


def test_prediction_is_the_most_probable_class(way: str) -> None:
    torch.manual_seed(0)
    tested = made(build_model("mlp", (1, 8, 8), 5, seed=0), way)
    images = torch.randn(1500, 1, 8, 8)
    with torch.no_grad():
        logits = copy.deepcopy(tested.model).double()(images.double())
    torch.testing.assert_close(tested.logits(tested.params(), images).double(), logits, rtol=1e-5, atol=1e-5)
    gap = logits.topk(2).values.diff().abs().flatten()
    assert torch.equal(tested.predict(tested.params(), images)[gap > 1e-4], logits.argmax(1)[gap > 1e-4])


def test_the_operators_take_what_they_know_and_nothing_else() -> None:
    def layers(*modules: nn.Module) -> list[int] | None:
        return classifier.network_layers(nn.Sequential(*modules))

    head = [nn.Flatten(), nn.Linear(8, 3)]
    conv = nn.Conv2d(1, 2, 3, padding=(0, 1), bias=False)
    known = layers(
        conv, nn.ReLU(), nn.MaxPool2d(2, stride=2), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    assert known == [2, 3, 3, 0, 1, 1, 1, 0, *(4, 0, 0, 0, 0, 0, 1, 1), *(3, 0, 0, 0, 0, 0, 0, 1)]
    for name in ("cnn", "mlp"):
        assert classifier.network_layers(build_model(name, (1, 16, 16), 10, 0)) is not None
    for unknown in (
        nn.Conv2d(1, 2, 3, stride=2),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(1, 2, 3, dilation=2),
        nn.Conv2d(1, 2, 3, padding="same"),
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(1, 2, 3).double(),
        nn.Conv2d(1, 2, 3).requires_grad_(False),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)),
        nn.Dropout(),
        nn.MaxPool2d(2),
        nn.ReLU(),
    ):
        assert layers(unknown, *head) is None
    for pool in (nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True)):
        assert layers(nn.Conv2d(1, 2, 3), pool, *head) is None
    shared = nn.Linear(3, 3)
    assert layers(*head, shared, shared) is None
    assert layers(nn.Linear(8, 3)) is None
    assert layers(nn.Conv2d(1, 2, 3), nn.Flatten()) is None
    assert classifier.network_layers(nn.Linear(8, 3)) is None
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert layers(*head, hooked) is None


def test_buffers_are_those_that_are_given() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(30, 1, 2, 2), torch.randint(0, 3, (30,))
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    tested = made(model, "autograd")
    given, order = tested.buffers(), torch.arange(30)[None]
    assert given.tolist() == [0] * 4 + [1] * 4 + [0]
    trained = []
    for _ in range(2):  # nothing is left of an earlier training
        buffers = given.clone()
        trained.append((tested.train(tested.params() * 0 + 0.1, images, labels, order, SGD(10, 0.1, 0.9, 0.0),
                                     buffers=buffers, seed=5), buffers))  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    params, buffers = trained[0]
    assert buffers[8] == 3
    mean = torch.zeros(4)
    for batch in images.flatten(1).split(10):
        mean = 0.9 * mean + 0.1 * batch.mean(0)
    torch.testing.assert_close(buffers[:4].float(), mean)
    tested.load_buffers(given)
    plain = copy.deepcopy(model)
    plain.load_state_dict(tested.state(params, buffers))
    torch.testing.assert_close(tested.logits(params, images, buffers), plain.eval()(images))
    assert not torch.equal(tested.logits(params, images, given), tested.logits(params, images, buffers))
    fisher = tested.fisher(params, images, labels, torch.arange(6), buffers)
    torch.testing.assert_close(fisher, diagonal_fisher(plain, (images[:6], labels[:6])))


class Textbook(nn.Module):
    """A network that takes it that what a convolution returns is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.dropout = nn.Dropout()
        self.out = nn.Linear(32 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.conv(x).relu())
        return self.out(x.view(len(x), -1))


@pytest.mark.parametrize("first", ["train", "grad", "logits"])
def test_models_that_flatten_by_view(first: str) -> None:
    torch.manual_seed(0)
    model = Textbook()
    twin, layout = copy.deepcopy(model), [p.stride() for p in model.parameters()]
    images, labels = torch.randn(24, 3, 8, 8).to(memory_format=torch.channels_last), torch.randint(4, (24,))
    tested = classifier_of(model)
    given = tested.params()
    if first == "grad":
        tested.grad(given, images, labels, torch.arange(8))
    if first == "logits":
        expected = twin.eval()(images.contiguous())
        torch.testing.assert_close(tested.logits(given, images), expected)
    trained = tested.train(given, images, labels, torch.arange(24)[None], SGD(8, 0.05, 0, 0), seed=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.05)
        for batch in torch.arange(24).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(images[batch].contiguous()), labels[batch]).backward()
            optimizer.step()
    torch.testing.assert_close(trained, torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert [p.stride() for p in model.parameters()] == layout
