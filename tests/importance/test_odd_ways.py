"""Models that take odd ways to their gradients: right, or refused."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import diagonal_fisher

N = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain(model, x, y, loss=F.cross_entropy):
    total = 0
    for n in range(len(y)):
        one = tuple(part[n : n + 1] for part in x) if isinstance(x, tuple) else x[n : n + 1]
        output = model(*one) if isinstance(one, tuple) else model(one)
        grads = torch.autograd.grad(loss(output, y[n : n + 1]), list(model.parameters()), materialize_grads=True)
        total = total + torch.cat([g.flatten() for g in grads]) ** 2
    return total / len(y)


def problem(width=4, classes=3):
    return torch.randn(N, width).double(), torch.randint(0, classes, (N,))


class Heads(nn.Module):
    """A second output from marked tokens only, of which there are as many in all as samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(1, 1)

    def forward(self, x, mask):
        values = self.c(self.b(x[mask]).tanh())
        per_token = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, values)
        return torch.cat([self.a(x.mean(1)), per_token.sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("check", ["first", "all", "off"])
def test_rows_that_only_a_later_pass_has_gradients_of(check):
    model = Heads().double()
    x, y, mask = torch.randn(N, 3, 4).double(), torch.randn(N, 2).double(), torch.zeros(N, 3, dtype=torch.bool)
    for n, count in enumerate((2, 0, 1, 0, 3, 0)):
        mask[n, :count] = True
    expected = sum(plain(model, (x, mask), y, lambda o, _, k=k: o[0, k] * 2**0.5) for k in range(2))
    fisher = diagonal_fisher(model, ((x, mask), y), "mse", kind="exact", check=check)
    torch.testing.assert_close(fisher, expected)


@pytest.mark.parametrize("reference", ["list", "closure"])
def test_a_parameter_by_a_reference_outside_of_the_modules_is_refused(reference):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Linear(4, 3), nn.Linear(3, 4)
            weight = self.embedding.weight
            self.held = [weight] if reference == "list" else lambda: weight

        def forward(self, x):
            weight = self.held[0] if reference == "list" else self.held()
            return self.head(self.embedding(x)) @ weight.t()

    with pytest.raises(ValueError, match=r"uses embedding\.weight by a reference outside of the modules"):
        diagonal_fisher(Tied().double(), problem())


@pytest.mark.parametrize("check", ["first", "off"])
@pytest.mark.parametrize("where", ["parameter", "module", "module before"])
def test_hooks_that_change_gradients(where, check):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if where == "parameter":
        model[0].weight.register_hook(lambda g: g * (torch.arange(4) % 2))
    elif where == "module":
        model[0].register_full_backward_hook(lambda m, inputs, outputs: None)
        model[1].register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] / inputs[0].norm(),))
    else:
        model[1].register_full_backward_pre_hook(lambda m, outputs: (outputs[0] / outputs[0].norm(),))
    x, y = problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


class Joins(nn.Module):
    """Every sample is moved by the batch's mean, which is its own where it is alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh(h + (h.mean(0) if len(h) > 1 else h[0])))


def test_a_first_batch_of_one_sample_shows_nothing():
    model, (x, y) = Joins().double(), problem()
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        fisher = diagonal_fisher(model, [(x[:1], y[:1]), (x[1:], y[1:])])
    torch.testing.assert_close(fisher, plain(model, x, y))


def test_a_model_that_differed_has_not_passed():
    model, (x, y) = Joins().double(), problem()
    for check in ("all", "first"):  # of several batches
        with pytest.warns(UserWarning, match="not those of plain autograd"):
            fisher = diagonal_fisher(model, (x, y), batch_size=3, check=check)
        torch.testing.assert_close(fisher, plain(model, x, y))


def test_a_class_that_is_defined_again_is_another_one():
    def defined(joins):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

            def forward(self, x):
                h = self.a(x)
                return self.b(torch.tanh(h + h.mean(0) * joins if len(h) > 1 else h + h * joins))

        return Net().double()

    x, y = problem()
    for _ in range(20):  # until the new class has the old one's address
        model = defined(0)
        address = id(type(model))
        diagonal_fisher(model, (x, y))
        del model
        gc.collect()
        model = defined(1)
        if id(type(model)) == address:
            break
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        fisher = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(fisher, plain(model, x, y))


def test_a_state_with_an_extra_state():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"scale": 2}

        def set_extra_state(self, state):
            pass

    model, (x, y) = nn.Sequential(Extra(4, 3)).double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), state=model.state_dict()), plain(model, x, y))
