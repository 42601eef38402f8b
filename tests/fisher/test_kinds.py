"""Kinds of labels, options of losses, and the squared batch gradient, against their definitions in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.kinds import KINDS
from fdcr_fast.fisher.losses import LOSSES
from tests.fisher.test_losses import OPTIONS_OF_TOKENS
from tests.support.fisher.one_by_one import fisher_one_by_one


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(outputs=4):
    """Layer rules, and a parameter that only ``vmap`` can do."""
    return nn.Sequential(nn.Linear(3, 6), nn.PReLU(), nn.LayerNorm(6), nn.Linear(6, outputs))


def assert_close(fisher, expected, tolerance=1e-5):
    assert fisher.shape == expected.shape
    assert (fisher - expected).norm() < tolerance * expected.norm()


def expected_fisher(model, x, labels, probability, loss):
    """Sum over labels of p(label | x) times the squared gradient, one sample at a time."""
    model = model.double()
    total = 0
    for sample in x.double().split(1):
        output = model(sample)
        for label in labels:
            grads = torch.autograd.grad(loss(output, label), list(model.parameters()), retain_graph=True)
            total = total + probability(output, label).detach() * torch.cat([g.flatten() for g in grads]) ** 2
    model.float()
    return total / len(x)


CLASSES = [torch.tensor([c]) for c in range(4)]
BITS = [torch.tensor([bits], dtype=torch.float64) for bits in itertools.product([0, 1], repeat=3)]
EXACT = {
    "cross_entropy": (4, CLASSES, lambda o, y: o.softmax(1)[0, y[0]], F.cross_entropy),
    "bce_with_logits": (
        3,
        BITS,
        lambda o, y: torch.where(y == 1, o.sigmoid(), 1 - o.sigmoid()).prod(),
        lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum"),
    ),
}


@pytest.mark.parametrize("loss", EXACT)
def test_exact_is_the_expectation_over_all_labels(loss):
    outputs, labels, probability, function = EXACT[loss]
    model = mlp(outputs)
    x = torch.randn(5, 3)
    ignored = torch.zeros(5, dtype=torch.long)
    fisher = diagonal_fisher(model, (x, ignored), loss, kind="exact")
    assert_close(fisher, expected_fisher(model, x, labels, probability, function))


def test_exact_nll():
    model = nn.Sequential(mlp(), nn.LogSoftmax(1))
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    expected = expected_fisher(model, x, CLASSES, lambda o, y: o.exp()[0, y[0]], F.nll_loss)
    assert_close(diagonal_fisher(model, (x, y), "nll", kind="exact"), expected)


def test_exact_mse_is_that_of_its_normal_distribution():
    """The expectation over y ~ N(f, 1/2) of the squared gradient of (f - y)^2, by three-point quadrature."""
    model = mlp(1)
    x = torch.randn(5, 3)
    points = [(-(1.5**0.5), 1 / 6), (0.0, 2 / 3), (1.5**0.5, 1 / 6)]  # moments of N(0, 1/2) up to the fifth
    expected = expected_fisher(
        model, x, points, lambda o, p: torch.tensor(p[1]), lambda o, p: (o - (o.detach() + p[0])).square().sum()
    )
    for targets in (torch.randn(5, 1), torch.zeros(5, 1)):
        assert_close(diagonal_fisher(model, (x, targets), "mse", kind="exact"), expected)


def test_outputs_without_a_second_dimension():
    model = nn.Sequential(mlp(1), nn.Flatten(0))
    x, y = torch.randn(5, 3), torch.rand(5)
    for loss in ("mse", "bce_with_logits"):
        for kind in ("exact", "sampled"):
            fisher = diagonal_fisher(model, (x, y), loss, kind=kind)
            wide = diagonal_fisher(model[0], (x, y[:, None]), loss, kind=kind)
            if kind == "exact":
                assert_close(fisher, wide)


@pytest.mark.parametrize("loss", ["cross_entropy", "nll", "bce_with_logits", "mse"])
def test_sampled_tends_to_exact(loss):
    model = mlp() if loss != "nll" else nn.Sequential(mlp(), nn.LogSoftmax(1))
    x = torch.randn(400, 3)
    y = torch.zeros(400, dtype=torch.long) if loss in ("cross_entropy", "nll") else torch.zeros(400, 4)
    exact = diagonal_fisher(model, (x, y), loss, kind="exact")
    few, many = (
        diagonal_fisher(model, (x, y), loss, kind="sampled", num_samples=n, generator=torch.Generator().manual_seed(1))
        for n in (1, 100)
    )
    error = [((f - exact).norm() / exact.norm()).item() for f in (few, many)]
    assert error[1] < 0.25 * error[0]  # 0.1 is expected of a hundred times as many draws
    assert error[1] < 0.05
    empirical = diagonal_fisher(model, (x, y), loss)
    assert (empirical - exact).norm() > 0.1 * exact.norm()


def test_sampled_draws_from_the_generator():
    model, data = mlp(), (torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    state = torch.get_rng_state()

    def draw(seed):
        return diagonal_fisher(model, data, kind="sampled", generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_dense_labels():
    """One draw per position: only those of the classes' own probabilities can be right."""
    model = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))  # the model is certain
    x, y = torch.randn(3, 2, 4, 4), torch.zeros(3, 4, 4, dtype=torch.long)
    drawn = diagonal_fisher(model.double(), (x.double(), y + 1), kind="sampled")
    torch.testing.assert_close(drawn, diagonal_fisher(model, (x.double(), y)))


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
def test_ignored_labels_have_no_part(kind):
    model = mlp()
    x, y = torch.randn(6, 3), torch.tensor([0, -100, 2, -100, 3, 1])
    there = y != -100

    def fisher(*data):
        generator = torch.Generator().manual_seed(0) if kind == "sampled" else None
        return diagonal_fisher(model.double(), data, kind=kind, generator=generator)

    x = x.double()
    part = fisher(x, y)
    if kind != "sampled":
        assert_close(part, fisher(x[there], y[there]) * 4 / 6, 1e-12)
    else:
        assert torch.equal(fisher(x, torch.full_like(y, -100)), torch.zeros_like(part))


LOSS_OPTIONS = [
    ("cross_entropy", {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0])}),
    ("cross_entropy", {"label_smoothing": 0.2}),
    ("cross_entropy", {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 1.0, 2.0, 0.1]), "ignore_index": 1}),
    ("nll", {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0]), "ignore_index": 2}),
    ("bce_with_logits", {"pos_weight": torch.tensor([0.5, 1.0, 2.0, 3.0]), "weight": torch.tensor(0.3)}),
]
FUNCTIONS = {
    "cross_entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize(("loss", "options"), LOSS_OPTIONS)
def test_loss_options(loss, options):
    model = mlp()
    x = torch.randn(8, 3)
    y = torch.rand(8, 4) if loss == "bce_with_logits" else torch.arange(8) % 4
    double = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    expected = fisher_one_by_one(model, x, y, lambda o, t: FUNCTIONS[loss](o, t, reduction="sum", **double))
    assert_close(diagonal_fisher(model, (x, y), loss, loss_options=options), expected)
    plain = diagonal_fisher(model, (x, y), loss)
    assert (plain - expected).norm() > 1e-2 * expected.norm()


def test_every_loss_option_has_a_case():
    tried = {(loss, option) for loss, options in [*LOSS_OPTIONS, *OPTIONS_OF_TOKENS] for option in options}
    assert tried == {(name, option) for name, loss in LOSSES.items() for option in loss.options}


def test_class_weights_in_the_exact_fisher():
    model, x = mlp(), torch.randn(5, 3)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0])
    function = EXACT["cross_entropy"][2]
    expected = expected_fisher(
        model, x, CLASSES, function, lambda o, y: F.cross_entropy(o, y, weight.double(), reduction="sum")
    )
    data = x, torch.zeros(5, dtype=torch.long)
    assert_close(diagonal_fisher(model, data, kind="exact", loss_options={"weight": weight}), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
def test_squared_batch_gradient(batch_size):
    model = mlp()
    x, y = torch.randn(8, 3), torch.randint(0, 4, (8,))
    model.double()
    squares = []
    for xb, yb in zip(x.double().split(batch_size or 8), y.split(batch_size or 8), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(xb), yb), list(model.parameters()))
        squares.append(torch.cat([g.flatten() for g in grads]) ** 2)
    model.float()
    result = diagonal_fisher(model, (x, y), kind="squared_batch_gradient", batch_size=batch_size)
    assert_close(result, torch.stack(squares).mean(0))
    sizes = torch.tensor([len(yb) for yb in y.split(batch_size or 8)])
    weighted = diagonal_fisher(model, (x, y), kind="squared_batch_gradient", batch_size=batch_size, weigh_batches=True)
    assert_close(weighted, sizes.double() @ torch.stack(squares) / 8)
    fisher = diagonal_fisher(model, (x, y))
    assert ((result - fisher).norm() < 1e-5 * fisher.norm()) == (batch_size == 1)


def test_squared_batch_gradient_of_sparse_embeddings():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 4))
    data = torch.randint(0, 9, (5, 2)), torch.randint(0, 4, (5,))
    sparse = diagonal_fisher(model, data, kind="squared_batch_gradient")
    model[0].sparse = False
    torch.testing.assert_close(sparse, diagonal_fisher(model, data, kind="squared_batch_gradient"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "true"}, f"unknown kind 'true': expected one of {', '.join(KINDS)}"),
        ({"kind": "exact", "num_samples": 3}, "for kind='sampled', got kind='exact'"),
        ({"generator": torch.Generator()}, "for kind='sampled'"),
        ({"kind": "sampled", "num_samples": 0}, "num_samples must be positive"),
        ({"kind": "sampled", "loss": lambda o, t: o.sum(1)}, "does not say how labels are distributed"),
        ({"kind": "exact", "loss": "bce_with_logits", "loss_options": {"weight": torch.ones(1)}}, "no loss options"),
        (
            {"loss_options": {"reduction": "mean"}},
            "no option reduction; it has class_dim, ignore_index, label_smoothing, per_sample, shift, weight",
        ),
        ({"loss": "mse", "loss_options": {"weight": 1}}, "no option weight; it has per_sample"),
        ({"loss": lambda o, t: o.sum(1), "loss_options": {"weight": 1}}, "a callable has its own"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(mlp(), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), **options)


def test_exact_of_dense_labels_is_refused():
    data = torch.randn(3, 2, 4, 4), torch.zeros(3, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"outputs \[N, C\], got \[3, 5, 4, 4\]; use kind='sampled'"):
        diagonal_fisher(nn.Conv2d(2, 5, 1), data, kind="exact")
