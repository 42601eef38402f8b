"""Models that take odd ways to their gradients: right, or refused."""

import gc

import pytest
import torch
import torch.nn.functional as F
from one_by_one import fisher_one_by_one
from torch import nn
from torch.utils.checkpoint import checkpoint

from fdcr_fast import diagonal_fisher
from fdcr_fast.importance.per_sample import PerSampleGradients

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


class Net(nn.Module):
    """Two layers and what a subclass does between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.between(torch.tanh(self.a(x))))


checks = pytest.mark.parametrize("check", ["first", "all", "off"])


@checks
def test_hooks_that_look_at_the_gradient_of_the_batch(check):
    class Normalised(Net):
        def between(self, h):
            h.register_hook(lambda g: g / g.norm())
            return h

    model, (x, y) = Normalised().double(), problem()
    register = torch.Tensor.register_hook
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))
    assert torch.Tensor.register_hook is register


@checks
def test_parameters_are_parameters_and_keep_their_attributes(check):
    class Asks(Net):
        def __init__(self):
            super().__init__()
            self.b.weight.scale = 3.0

        def between(self, h):
            ours = all(isinstance(p, nn.Parameter) for p in self.parameters())
            return h * getattr(self.b.weight, "scale", 1.0) * (2 if ours else 1)

    model, (x, y) = Asks().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))
    assert vars(model.b.weight) == {"scale": 3.0}
    state = {name: value * 2 for name, value in model.state_dict().items()}
    fisher = diagonal_fisher(model, (x, y), state=state, check=check)
    model.load_state_dict(state)
    torch.testing.assert_close(fisher, plain(model, x, y))


class Again(torch.autograd.Function):
    """A block that is computed again in the backward pass, as reversible and memory-efficient ones are."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


def by_backward(model, x, y):
    total = 0
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(xi), yi).backward()
        total = total + torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() ** 2 for p in model.parameters()]
        )
    model.zero_grad()
    return total / len(y)


@checks
@pytest.mark.parametrize("again_outside", [False, True])
def test_functions_whose_backward_pass_reaches_parameters(again_outside, check):
    class Reversible(Net):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(5, 5)

        def between(self, h):
            h = Again.apply(h, self.block)
            return self.block(h) if again_outside else h

    model, (x, y) = Reversible().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), by_backward(model, x, y))


@checks
@pytest.mark.parametrize("function", [Again.apply, lambda x, block: checkpoint(block, x, use_reentrant=True)])
def test_parameters_hidden_from_some_batches(function, check):
    """The input of the hidden block has a gradient only if the frozen layer before it has one."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.frozen(x)
            return self.head(h if x.max() < 9 else function(h, self.block))

    model, (x, y) = Sometimes().double(), problem()
    x[3:, 0] = 10
    wanted = ["block.weight", "block.bias", "head.weight", "head.bias"]
    fisher = diagonal_fisher(model, (x, y), params=wanted, batch_size=3, check=check)
    torch.testing.assert_close(fisher, by_backward(model, x, y)[20:])


class Straight(torch.autograd.Function):
    """A function written in Python that hides nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@checks
def test_functions_written_in_python_that_hide_nothing(check, monkeypatch):
    class Rounded(Net):
        def between(self, h):
            return Straight.apply(h * 5)

    monkeypatch.setattr(PerSampleGradients, "sum_squares", None)  # not needed
    model, (x, y) = Rounded().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


def test_rows_of_small_gradients_in_half_precision():
    """As many tokens as samples, two of some samples: small gradients must not hide it."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(2, 64), nn.Linear(64, 3)

        def forward(self, x):
            chosen = (x[:, 0] > 0)[:, None].expand(-1, 2)
            h = self.a(x.view(-1, 2, 2)[chosen])
            h = torch.zeros(len(x), 2, 64, dtype=x.dtype).index_put(chosen.nonzero(as_tuple=True), h)
            return self.head(torch.tanh(h).sum(1)) * 0.01

    model = Tokens().half()
    x, y = torch.randn(4, 4), torch.randint(0, 3, (4,))
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    fisher = diagonal_fisher(model, (x.half(), y), params=["a.weight"], check="off")
    expected = diagonal_fisher(model, (x.half(), y), params=["a.weight"], check="off", batch_size=1)
    torch.testing.assert_close(fisher, expected, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("how", ["weight", "parameters", "buffer"])
def test_an_eval_that_writes_to_weights_is_refused(how):
    class Merging(Net):
        """As layers of low rank do."""

        def __init__(self):
            super().__init__()
            self.low = nn.Parameter(torch.randn(3, 5))
            self.register_buffer("count", torch.zeros(()))
            self.merged = False

        def train(self, mode=True):
            if self.merged == mode:
                if how == "weight":
                    self.b.weight.data += -self.low if mode else self.low
                elif how == "parameters":
                    self.b.weight = nn.Parameter(self.b.weight + (-self.low if mode else self.low))
                else:
                    self.count += 1
                self.merged = not mode
            return super().train(mode)

        def between(self, h):
            return h

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) if self.merged else self.b(h) + F.linear(h, self.low)

    model, (x, y) = Merging().double(), problem()
    before, weight = {name: value.clone() for name, value in model.state_dict().items()}, model.b.weight
    name = "count" if how == "buffer" else r"b\.weight"
    for state in (None, before):
        with pytest.raises(ValueError, match=rf"eval\(\) changes {name}: .* pass eval_mode=False"):
            diagonal_fisher(model, (x, y), state=state)
        assert model.b.weight is weight
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training
        assert not model.merged
    torch.testing.assert_close(diagonal_fisher(model, (x, y), eval_mode=False), plain(model, x, y))


def test_an_eval_of_its_own_is_respected_and_undone():
    class Switching(Net):
        def __init__(self):
            super().__init__()
            self.factor, self.log = 1.0, []

        def train(self, mode=True):
            self.factor = 1.0 if mode else 2.0
            self.log.append(mode)
            return super().train(mode)

        def between(self, h):
            return h * self.factor

    model, (x, y) = Switching().double(), problem()
    fisher = diagonal_fisher(model, (x, y))
    assert (model.training, model.factor, model.log) == (True, 1.0, [])
    torch.testing.assert_close(fisher, plain(model.eval(), x, y))


def test_batch_normalisation_called_by_keyword_in_another_layout():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(4, 3)
            self.norm.weight.register_hook(lambda g: g)  # all by plain autograd

        def forward(self, x):
            return self.head(self.norm(input=x).permute(2, 1, 0, 3).movedim(2, 0).flatten(1))

    model, y = Tokens().double().eval(), torch.tensor([2])
    nn.init.uniform_(model.norm.weight)
    x = torch.randn(1, 2, 2, 1).double()
    torch.testing.assert_close(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


@pytest.mark.parametrize("check", ["first", "off"])
def test_layers_changed_for_a_call(check):
    class Dilated(nn.Module):
        """One call with another stride than the layer has before and afterwards."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(1, 2, 2), nn.Linear(2, 3)

        def forward(self, x):
            self.conv.stride = (2,)
            h = self.conv(x[:, None])
            self.conv.stride = (1,)
            return self.head(torch.tanh(h).sum(2))

    model, (x, y) = Dilated().double(), problem(8)
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


@pytest.mark.parametrize("check", ["first", "off"])
@pytest.mark.parametrize("odd", ["one bias", "row", "scalar", "vector", "attribute"])
def test_layers_with_odd_parameters(odd, check):
    layer = nn.Linear(4, 3).double()
    if odd == "one bias":
        layer.bias = nn.Parameter(torch.randn(1).double())
    elif odd == "row":
        layer.bias = nn.Parameter(torch.randn(1, 3).double())
    elif odd == "scalar":
        layer.bias = nn.Parameter(torch.randn(()).double())
    elif odd == "vector":
        layer.weight, layer.bias = nn.Parameter(torch.randn(4).double()), None
    else:
        vars(layer)["weight"] = layer.weight * 2  # in front of the parameter
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Unflatten(0, (-1, 1)) if odd == "vector" else nn.Tanh())
    if odd == "vector":
        model.append(nn.Linear(1, 3))
    model, (x, y) = model.double(), problem()
    wanted = [name for name, _ in model.named_parameters() if odd != "attribute" or name != "2.weight"]
    used = torch.cat([torch.full_like(p, name in wanted).flatten() for name, p in model.named_parameters()]).bool()
    if odd == "attribute":
        vars(layer)["weight"] = vars(layer)["weight"].detach()
    fisher = diagonal_fisher(model, (x, y), params=wanted, check=check)
    expected = 0
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(model(xi), yi)
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        expected = expected + torch.cat([g.flatten() for g in grads]) ** 2
    torch.testing.assert_close(fisher, expected[used] / N)
