"""Models that take odd ways to their gradients: right, or refused."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one
from tests.support.fisher.random_networks.prelude import ComputedAgain, Doubled

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
            h = ComputedAgain.apply(h, self.block)
            return self.block(h) if again_outside else h

    model, (x, y) = Reversible().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), by_backward(model, x, y))


@checks
@pytest.mark.parametrize("function", [ComputedAgain.apply, lambda x, block: checkpoint(block, x, use_reentrant=True)])
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


@checks
def test_functions_written_in_python_that_hide_nothing(check, monkeypatch):
    class Rounded(Net):
        def between(self, h):
            return Doubled.apply(h)

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
    torch.testing.assert_close(fisher, plain(model, x, y)[used])


def test_text_and_lengths_in_lists():
    class Domains(nn.Module):
        """A head by name, and sequences cut by lengths."""

        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(4, 3) for name in "ab"})

        def forward(self, x, names, lengths=None, size=(4, 4), title="t"):
            assert size == (4, 4)
            assert title == "t"
            lengths = [3] * len(x) if lengths is None else lengths
            return torch.stack([self.heads[n](xi[:t].sum(0)) for xi, n, t in zip(x, names, lengths, strict=True)])

    model, x, y = Domains().double(), torch.randn(N, 3, 4).double(), torch.randint(0, 3, (N,))
    names, lengths = list("abaabb"), [3, 1, 2, 3, 2, 1]
    expected = plain(model, (x, names, lengths), y)
    whole = {"x": x, "names": names, "lengths": lengths, "size": (4, 4), "title": "t", "labels": y}
    for batch_size in (None, 2, 4):
        torch.testing.assert_close(diagonal_fisher(model, whole, batch_size=batch_size), expected)
    torch.testing.assert_close(diagonal_fisher(model, ((x, tuple(names), lengths), y), check="off"), expected)


@pytest.mark.parametrize("given", ["model", "state"])
def test_frozen_parameters_by_a_reference_outside_of_the_modules(given):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Linear(4, 3), nn.Linear(3, 4)
            self.embedding.weight.requires_grad_(False)
            self.held = [self.embedding.weight]

        def forward(self, x):
            return self.head(self.embedding(x)) @ self.held[0].t()

    model = Tied().double()
    state = {name: x * 2 for name, x in model.state_dict().items()} if given == "state" else None
    with pytest.raises(ValueError, match=r"uses embedding\.weight by a reference outside of the modules"):
        diagonal_fisher(model, problem(), state=state)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


@pytest.mark.parametrize("registered", [False, True])
def test_buffers_made_in_the_forward_pass(registered):
    class Lazy(nn.Module):
        """An input normalisation that the first batch makes."""

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
            if registered:
                self.register_buffer("mean", None)

        def forward(self, x):
            if getattr(self, "mean", None) is None:
                if registered:
                    self.mean = x.detach().mean(0)
                else:
                    self.register_buffer("mean", x.detach().mean(0))
            return self.a(x - 0.5 * self.mean)

    model, (x, y) = Lazy().double(), problem()
    expected = 0
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model.a(xi - 0.5 * xi.mean(0)), yi), list(model.parameters()))
        expected = expected + torch.cat([g.flatten() for g in grads]) ** 2 / N
    for batch_size in (None, 4):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), batch_size=batch_size), expected)
    assert list(model.state_dict()) == ["a.weight", "a.bias"]


@pytest.mark.parametrize("register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_hooks_on_the_gradients_of_all_modules(register):
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), problem()
    handle = getattr(nn.modules.module, register)(
        lambda m, grads, *_: (grads[0] / grads[0].norm(),) if isinstance(m, nn.Tanh) else None
    )
    try:
        torch.testing.assert_close(diagonal_fisher(model, (x, y)), plain(model, x, y))
    finally:
        handle.remove()


def test_values_assigned_to_parameters_in_the_forward_pass():
    class Assigns(Net):
        def between(self, h):
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(self.b.parameters()) * 0.9, self.b.parameters())
            return h

    model, (x, y) = Assigns().double(), problem()
    whole = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(diagonal_fisher(model, (x, y), batch_size=2), whole)


class Manifold(nn.Parameter):
    """A parameter class of one's own."""

    def projected(self):
        return self / (1 + self.norm())


@checks
def test_classes_of_parameters(check):
    class Projected(Net):
        def __init__(self):
            super().__init__()
            self.p = Manifold(torch.randn(5))

        def between(self, h):
            return h * self.p.projected() * (2 if isinstance(self.p, Manifold) else 1)

    model, (x, y) = Projected().double(), problem()
    model.p = Manifold(model.p.detach())
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


def test_names_that_wrappers_make_ambiguous():
    class Outer(Net):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"a": nn.Linear(5, 5)})

        def between(self, h):
            return self.module["a"](h)

    model, (x, y) = Outer().double(), problem()
    state = {f"module.{name}": value * 2 for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the model has .* of state"):
        diagonal_fisher(model, (x, y), state=state)


@checks
@pytest.mark.parametrize("how", ["product", "sum", "of a complex copy"])
def test_real_parameters_of_complex_tensors(how, check):
    class Spectral(Net):
        """A gate in the Fourier domain."""

        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.randn(3))

        def between(self, h):
            spectrum = torch.fft.rfft(h)
            gate = self.gate.to(spectrum.dtype) if how == "of a complex copy" else self.gate
            return torch.fft.irfft(spectrum + gate if how == "sum" else spectrum * gate, 5)

    model, (x, y) = Spectral().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


def test_models_that_differentiate_by_their_inputs():
    class Potential(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 1)

        def forward(self, x):
            return torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0]

    model, (x, _) = Potential().double(), problem()
    x.requires_grad_()
    y = torch.randn(N, 4).double()
    expected = plain(model, x, y, lambda o, t: F.mse_loss(o, t, reduction="sum"))
    torch.testing.assert_close(
        diagonal_fisher(model, (x, y), "mse", params=["a.weight", "a.bias", "b.weight"]), expected[:-1]
    )
    assert x.grad is None


@checks
def test_parameters_without_elements(check):
    class Empty(Net):
        """With a parameter that only tells the device, and a layer of no inputs."""

        def __init__(self):
            super().__init__()
            self.device, self.none = nn.Parameter(torch.empty(0)), nn.Linear(0, 5)

        def between(self, h):
            return h + self.none(h[:, :0])

    model, (x, y) = Empty().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check=check), plain(model, x, y))


def test_a_sparse_factor():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return torch.mm(x.to_sparse(), self.weight)

    model, (x, y) = Bag().double(), problem()
    torch.testing.assert_close(diagonal_fisher(model, (x.relu(), y)), plain(model, x.relu(), y))


def test_a_second_try_begins_anew():
    class Counts(nn.Module):
        """Its view() does not take images with channels last."""

        def __init__(self):
            super().__init__()
            self.conv, self.head, self.calls = nn.Conv2d(3, 4, 3), nn.Linear(16, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.head(self.conv(x).view(len(x), -1)) / self.calls

    model, x, y = Counts().double(), torch.randn(N, 3, 4, 4).double(), torch.randint(0, 3, (N,))
    fisher = diagonal_fisher(model, (x, y), check="off")
    model.forward = lambda x: model.head(model.conv(x).view(len(x), -1))
    torch.testing.assert_close(fisher, plain(model, x, y))


def test_parameters_are_those_that_the_model_names():
    class HeadOnly(Net):
        def between(self, h):
            return h

        def named_parameters(self, *args, **kwargs):
            return self.b.named_parameters("b")

    model, (x, y) = HeadOnly().double(), problem()
    assert torch.equal(diagonal_fisher(model, (x, y)), diagonal_fisher(model, (x, y), params=["b.weight", "b.bias"]))
