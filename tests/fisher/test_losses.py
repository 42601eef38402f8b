"""Losses by name of outputs and targets in all the shapes in which they come, against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import diagonal_fisher
from tests.support.fisher.one_by_one import fisher_one_by_one

N, T, C = 4, 6, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_fisher(fisher, expected):
    assert fisher.shape == expected.shape
    assert (fisher - expected).norm() < 1e-5 * expected.norm()


class Tokens(nn.Module):
    """Scores of every token, the classes last or in another dimension."""

    def __init__(self, *order, log=False):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, C)
        self.order = order
        self.log = log

    def forward(self, x):
        scores = self.out(torch.tanh(self.embed(x)).cumsum(1))
        return (scores.log_softmax(-1) if self.log else scores).permute(*self.order)


def tokens(length=T):
    y = torch.randint(0, C, (N, length))
    y[0, 2:] = y[1] = -100  # padding, and a sample without a label
    return torch.randint(0, 9, (N, length)), y


def definition(scores, targets, *, per_sample="sum", shift=0, class_dim=-1, nll=False, ignore_index=-100, **options):
    """Of one sample: the loss of every token by itself."""
    scores = scores.movedim(class_dim, -1)[0]
    total, labelled = 0, 0
    for t in range(targets.shape[1] - shift):
        label = targets[0, t + shift]
        if label != ignore_index:
            one = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
            function = F.nll_loss if nll else F.cross_entropy
            total = total + function(scores[t][None], label[None], reduction="sum", **one)
            labelled += 1
    return total / (max(labelled, 1) if per_sample == "mean" else 1) + 0 * scores.sum()


OPTIONS_OF_TOKENS = [
    ("cross_entropy", {}),
    ("cross_entropy", {"per_sample": "mean"}),
    ("cross_entropy", {"shift": 1}),
    ("cross_entropy", {"shift": 2, "per_sample": "mean", "weight": WEIGHT, "label_smoothing": 0.1}),
    ("cross_entropy", {"class_dim": -1, "ignore_index": 3}),
    ("nll", {"per_sample": "mean", "shift": 1, "weight": WEIGHT}),
    ("nll", {"class_dim": 2}),
    ("mse", {"per_sample": "mean"}),
    ("bce_with_logits", {"per_sample": "mean"}),
]


@pytest.mark.parametrize(
    ("loss", "options"), [case for case in OPTIONS_OF_TOKENS if case[0] in ("cross_entropy", "nll")]
)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_losses_of_tokens(loss, options, order):
    dim = order.index(2)
    options = {name: dim if name == "class_dim" else option for name, option in options.items()}
    model = Tokens(*order, log=loss == "nll")
    x, y = tokens()
    if options.get("ignore_index") is not None:
        y = y.clamp_min(0)
    expected = fisher_one_by_one(
        model, x, y, lambda o, t: definition(o, t, nll=loss == "nll", **options | {"class_dim": dim})
    )
    assert_fisher(diagonal_fisher(model, (x, y), loss, loss_options=options), expected)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_mean_over_outputs(loss):
    function = {"mse": F.mse_loss, "bce_with_logits": F.binary_cross_entropy_with_logits}[loss]
    model = Tokens(0, 1, 2)
    x, y = torch.randint(0, 9, (N, T)), torch.rand(N, T, C)
    fisher = diagonal_fisher(model, (x, y), loss, loss_options={"per_sample": "mean"})
    assert_fisher(fisher, fisher_one_by_one(model, x, y, function))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_as_many_tokens_as_classes(order):
    """Nothing tells then which dimension holds the classes."""
    dim = order.index(2)
    model = Tokens(*order)
    x, y = tokens(C)
    expected = fisher_one_by_one(model, x, y, lambda o, t: definition(o, t, class_dim=dim))
    assert_fisher(diagonal_fisher(model, (x, y), loss_options={"class_dim": dim}), expected)
    with pytest.warns(UserWarning, match=r"\[4, 5, 5\] and targets \[4, 5\] do not tell .* taken to be 2"):
        fisher = diagonal_fisher(model, (x, y))
    assert torch.allclose(fisher, expected.float(), rtol=1e-4) == (dim == 2)


def test_as_many_pixels_as_classes():
    """Images have the classes before the pixels."""
    model = nn.Conv2d(2, C, 1)
    x, y = torch.randn(N, 2, C, C), torch.randint(0, C, (N, C, C))
    with pytest.warns(UserWarning, match="taken to be 1"):
        assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((N,), (N, 1)), ((N, 1), (N,)), ((N, 1, 1), (N, 1)), ((N, 3, 1), (N, 3))]
)
def test_dimensions_of_size_one(loss, shape, outputs):
    class Shaped(nn.Linear):
        def forward(self, x):
            return super().forward(x).view(len(x), *outputs[1:])

    model = Shaped(4, torch.Size(outputs[1:]).numel())
    function = {"mse": F.mse_loss, "bce_with_logits": F.binary_cross_entropy_with_logits}[loss]
    x, y = torch.randn(N, 4), torch.rand(shape)
    expected = fisher_one_by_one(model, x, y, lambda o, t: function(o.flatten(), t.flatten(), reduction="sum"))
    assert_fisher(diagonal_fisher(model, (x, y), loss), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("column", [True, False])
def test_class_indices_of_any_integers_also_in_a_column(dtype, column):
    model = nn.Linear(4, C)
    x, y = torch.randn(N, 4), torch.randint(0, C, (N,))
    given = y.to(dtype)[:, None] if column else y.to(dtype)
    assert_fisher(diagonal_fisher(model, (x, given)), fisher_one_by_one(model, x, y))


def test_integer_targets_of_losses_of_numbers():
    model = nn.Linear(4, 1)
    x, y = torch.randn(N, 4), torch.randint(0, 2, (N, 1))
    for loss in ("mse", "bce_with_logits"):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), loss), diagonal_fisher(model, (x, y.float()), loss))


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_drawn_labels_in_a_column(kind):
    model, x, y = nn.Linear(4, C), torch.randn(N, 4), torch.randint(0, C, (N,))

    def fisher(targets):
        generator = torch.Generator().manual_seed(0) if kind == "sampled" else None
        return diagonal_fisher(model, (x, targets), kind=kind, generator=generator)

    assert torch.equal(fisher(y), fisher(y[:, None]))


def test_drawn_tokens():
    """A model that is certain draws what it is certain of, and what is ignored stays so."""
    model = Tokens(0, 1, 2).double()
    with torch.no_grad():
        model.out.bias.copy_(torch.tensor([80.0, 0, 0, 0, 0]))
    x, y = tokens()
    drawn = diagonal_fisher(model, (x, y), kind="sampled", loss_options={"shift": 1})
    certain = torch.where(y == -100, -100, 0)
    torch.testing.assert_close(drawn, diagonal_fisher(model, (x, certain), loss_options={"shift": 1}))


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        ("mse", (N, 3), torch.zeros(N, 2), r"outputs \[4, 3\] need targets of that shape, got \[4, 2\]"),
        ("mse", (N, N), torch.zeros(N), r"outputs \[4, 4\] need targets of that shape, got \[4\]"),
        ("bce_with_logits", (N, 1), torch.zeros(N, 3), r"outputs \[4, 1\] need targets of that shape"),
        (
            "cross_entropy",
            (N, T, C),
            torch.zeros(N, 3).long(),
            r"dimension 1 or 2, need class indices \[4, 5\] or \[4, 6\]",
        ),
        ("cross_entropy", (N, C), torch.zeros(N), r"of an integer dtype, .*; got targets \[4\] of torch.float32"),
        ("cross_entropy", (N,), torch.zeros(N).long(), r"outputs \[4\], with classes in dimension 1"),
        ("cross_entropy", (N, C), (torch.zeros(N).long(), torch.zeros(N)), "targets that are one tensor, got tuple"),
    ],
)
def test_shapes_that_do_not_fit(loss, outputs, targets, message):
    class Shaped(nn.Linear):
        def forward(self, x):
            return super().forward(x).view(outputs)

    with pytest.raises(ValueError, match=message):
        diagonal_fisher(Shaped(4, torch.Size(outputs[1:]).numel()), [(torch.randn(N, 4), targets)], loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_sample": "max"}, "per_sample must be 'sum' or 'mean', got 'max'"),
        ({"class_dim": 1}, r"classes in dimension 1, need class indices \[4, 5\]"),
    ],
)
def test_bad_options_of_tokens(options, message):
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(Tokens(0, 1, 2), tokens(), loss_options=options)


def test_shift_takes_tokens():
    with pytest.raises(ValueError, match="shift takes outputs with one dimension of positions"):
        diagonal_fisher(nn.Linear(4, C), (torch.randn(N, 4), torch.zeros(N).long()), loss_options={"shift": 1})


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2)])
def test_nll_of_probabilities(order, weight):
    """As cross_entropy, which has log_softmax in it, takes them."""
    x, y = torch.randint(0, 9, (N, T)), torch.rand(N, T, C).softmax(-1).permute(order)
    torch.manual_seed(1)
    log = Tokens(*order, log=True)
    torch.manual_seed(1)
    scores = Tokens(*order)
    options = {"class_dim": order.index(2)} | ({} if weight is None else {"weight": weight})
    fisher = diagonal_fisher(log, (x, y), "nll", loss_options=options)
    assert_fisher(fisher, diagonal_fisher(scores, (x, y), loss_options=options))


class Tied(nn.Module):
    """Parameters that only the fallback can do."""

    def __init__(self):
        super().__init__()
        self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.tied(torch.tanh(self.tied(x)))))


@pytest.mark.parametrize("check", ["off", "first", "all"])
@pytest.mark.parametrize("make", [Tied, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))])
def test_a_loss_that_writes_to_its_targets(make, check):
    def loss(output, target):
        target.sub_(5.0)
        return (output - target).square().sum(-1)

    model, x, y = make().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    kept = y.clone()
    fisher = diagonal_fisher(model, (x, y), loss, check=check)
    expected = fisher_one_by_one(model, x, y, lambda output, target: (output - (target - 5)).square().sum())
    torch.testing.assert_close(fisher, expected)
    assert torch.equal(y, kept)
