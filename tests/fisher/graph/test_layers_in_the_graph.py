"""Layers whose outputs are changed in place, that are called in odd ways, or that are not called as they look."""

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from fdcr_fast import ParamLayout, diagonal_fisher
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one

N = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomised(model):
    """Zeros hide whatever stands before them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5) if name.endswith("var") else b.normal_(0, 0.3)
    return model.double().eval()


def squares(model, x, y):
    """By name, without a copy of the model, which not all of them allow; by ``backward``, which all checkpoints do."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        F.cross_entropy(model(xi), yi, reduction="sum").backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.to_dense() ** 2 / len(x)
                p.grad = None
    return total


def assert_exact(model, x, y, **options):
    """Every parameter, with and without the self-check."""
    expected = squares(model, x, y)
    largest = max(part.max() for part in expected.values())
    layout = ParamLayout.from_module(model)
    for check in ("off", "all"):
        fisher = layout.unflatten(diagonal_fisher(model, (x, y), check=check, **options))
        for name, part in expected.items():
            torch.testing.assert_close(fisher[name], part, rtol=1e-9, atol=1e-18 * largest.item(), msg=name)


@contextmanager
def rules_alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerSampleGradients, "sum_squares", None)
        yield


class Recurrent(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.bilinear(x, x.flip(1))


def real(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def integers(*shape):
    return lambda: torch.randint(0, 6, (N, *shape))


IMAGES = {
    "Conv2d": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "Conv2d, circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d, same": lambda: nn.Conv2d(4, 4, (2, 3), padding="same"),
    "Conv2d, groups": lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
    "Conv2d, dilated": lambda: nn.Conv2d(4, 4, 2, dilation=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm2d, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm((4, 4, 4)),
    "Linear": lambda: nn.Linear(4, 4),
    "PReLU": lambda: nn.PReLU(4),
}
SIGNALS = {
    "Conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 4, 3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True),
    "Linear": lambda: nn.Linear(4, 4),
    "Linear without bias": lambda: nn.Linear(4, 4, bias=False),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "LayerNorm without bias": lambda: nn.LayerNorm(4, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(4, eps=1e-5),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LSTM": lambda: Recurrent(nn.LSTM(4, 4, batch_first=True)),
    "GRU": lambda: Recurrent(nn.GRU(4, 4, 2, batch_first=True)),
    "RNN": lambda: Recurrent(nn.RNN(4, 2, batch_first=True, bidirectional=True)),
    "MultiheadAttention": Attention,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "TransformerEncoderLayer, in place": lambda: nn.TransformerEncoderLayer(
        4, 2, 8, batch_first=True, activation=nn.ReLU(inplace=True)
    ),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
}
FEATURES = {
    "Linear": lambda: nn.Linear(4, 4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "Bilinear": Bilinear,
    "PReLU": lambda: nn.PReLU(),
}
LAYERS = {
    **{f"{name} of features": (layer, real(4)) for name, layer in FEATURES.items()},
    **{f"{name} of signals": (layer, real(4, 4)) for name, layer in SIGNALS.items()},
    **{f"{name} of images": (layer, real(4, 4, 4)) for name, layer in IMAGES.items()},
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), real(2, 3, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), real(2, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(6, 4), integers(4)),
    "Embedding, padding": (lambda: nn.Embedding(6, 4, padding_idx=2), integers(5)),
    "Embedding, frequency": (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), integers(5)),
    "Embedding, shortened": (lambda: nn.Embedding(6, 4, max_norm=0.7), integers(5)),
    "Embedding, sparse": (lambda: nn.Embedding(6, 4, sparse=True), integers(5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(6, 4), integers(5)),
    "EmbeddingBag, sparse": (lambda: nn.EmbeddingBag(6, 4, sparse=True), integers(5)),
}
IN_PLACE = {
    "relu": lambda h: F.relu(h, inplace=True),
    "add": lambda h: h.add_(torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype)).tanh(),
    "multiply": lambda h: h.mul_(h.detach().abs() + 0.5),
    "write": lambda h: h.index_fill_(-1, torch.tensor([0]), 0.3).tanh(),
    "write to a part": lambda h: _written(h).tanh(),
    "view": lambda h: h.flatten(1).sigmoid_(),
    "transposed view": lambda h: h.transpose(0, -1).relu_().transpose(0, -1),
}


def _written(h):
    h[..., :1] = h[..., -1:].detach() * 2
    return h


class Changed(nn.Module):
    """A layer, a change in place of its output, and a head."""

    def __init__(self, layer, change, x):
        super().__init__()
        self.layer = layer.double()
        self.change = change
        self.head = nn.Linear(self.features(x).shape[1], 3)

    def features(self, x):
        h = self.layer(x.tanh() if x.is_floating_point() else x)
        return self.change(h).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_changed_in_place(layer, change):
    make, inputs = LAYERS[layer]
    x = inputs()
    with torch.no_grad():
        model = Changed(make().eval(), IN_PLACE[change], x)
    assert_exact(randomised(model), x, torch.randint(0, 3, (N,)))


@pytest.mark.parametrize("change", ["relu", "add", "multiply", "write"])
@pytest.mark.parametrize(
    "layer", ["Linear of signals", "InstanceNorm1d of signals", "Conv2d of images", "Linear of images"]
)
def test_rules_are_used_for_outputs_that_are_changed_in_place(layer, change):
    make, inputs = LAYERS[layer]
    x, y = inputs(), torch.randint(0, 3, (N,))
    with torch.no_grad():
        model = randomised(Changed(make(), IN_PLACE[change], x))
    with rules_alone():
        fisher = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(fisher, fisher_one_by_one(model, x, y))


class Residual(nn.Module):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        out = self.b(h)
        out += h
        return self.head(out).mean(1)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)


def test_residual_in_place_by_rules_alone():
    model = randomised(Residual())
    x, y = torch.randn(N, 5, 4).double(), torch.randint(0, 3, (N,))
    with rules_alone():
        fisher = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(fisher, fisher_one_by_one(model, x, y))


class TimeFirst(nn.Module):
    """As nn.Transformer is by default; as many positions as samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x.t())
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(0))


class Windows(nn.Module):
    """As in Swin: a window is a row of the batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.inside, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        n = len(x)
        h = self.norm(x).view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n * 4, 4, 4)
        h = torch.tanh(self.inside(h)).softmax(1)
        return self.head(h.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n, 16, 4).amax(1))


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.each(x.flatten(0, -2))).view(len(x), -1, 5).sum(1))


@pytest.mark.parametrize(
    ("model", "inputs"), [(TimeFirst, integers(N)), (Windows, real(4, 4, 4)), (Merged, real(3, 2, 4))]
)
@pytest.mark.parametrize("n", [1, 2, N])
def test_samples_in_any_dimension_by_rules_alone(model, inputs, n):
    model = randomised(model())
    x, y = inputs()[:n], torch.randint(0, 3, (n,))
    with rules_alone():
        fisher = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(fisher, fisher_one_by_one(model, x, y))


class Odd(nn.Module):
    """A layer ``a`` that is used in some odd way between two others."""

    def __init__(self, use):
        super().__init__()
        self.first, self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.use = use

    def forward(self, x):
        return self.head(torch.tanh(self.use(self, torch.tanh(self.first(x)))))


def under_no_grad_and_by_function(model, h):
    with torch.no_grad():
        offset = model.a(h)
    return F.linear(h, model.a.weight, model.a.bias) + offset


def with_output_thrown_away(model, h):
    model.a(h)
    return F.linear(h, model.a.weight, model.a.bias)


def with_output_detached(model, h):
    return model.a(h).detach() + F.linear(h, model.a.weight, model.a.bias)


def with_other_parameters(model, h):
    other = {"weight": model.a.weight.detach() * 2, "bias": model.a.bias.detach()}
    return functional_call(model.a, other, (h,)) + F.linear(h, model.a.weight, model.a.bias)


def with_parameters_that_depend_on_its_own(model, h):
    other = {"weight": model.a.weight.sin(), "bias": model.a.bias}
    return functional_call(model.a, other, (h,))


def through_vmap(model, h):
    return torch.func.vmap(model.a)(h)


def in_two_parts(model, h):
    return torch.cat([model.a(h[: len(h) // 2]), model.a(h[len(h) // 2 :])])


def for_each_sample(model, h):
    return torch.stack([model.a(x) for x in h])


def in_another_order(model, h):
    order = h.detach()[:, 0].argsort()
    return model.a(h[order])[order.argsort()]


def weight_besides(model, h):
    return model.a(h) @ model.a.weight


def recomputed(model, h):
    return checkpoint(model.a, h, use_reentrant=False)


def recomputed_the_old_way(model, h):
    return checkpoint(model.a, h, use_reentrant=True)


def through_its_own_gradient(model, h):
    """An energy whose gradient is what counts."""
    with torch.enable_grad():
        (force,) = torch.autograd.grad(model.a(h).square().sum(), h, create_graph=True)
    return force


USES = [
    under_no_grad_and_by_function,
    with_output_thrown_away,
    with_output_detached,
    with_other_parameters,
    with_parameters_that_depend_on_its_own,
    through_vmap,
    in_two_parts,
    for_each_sample,
    in_another_order,
    weight_besides,
    recomputed,
    recomputed_the_old_way,
    through_its_own_gradient,
]


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_odd_uses_of_a_layer(use, n):
    assert_exact(randomised(Odd(use)), torch.randn(n, 4).double(), torch.randint(0, 3, (n,)))


def replaced_forward(model):
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 3


def replaced_by_another_layer(model):
    model[0].forward = lambda x: F.linear(x, model[0].weight * 2) + model[0].bias


def pre_hook(model):
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook(model):
    model[0].register_forward_hook(lambda module, args, output: output * 3)


def hook_in_place(model):
    model[0].register_forward_hook(lambda module, args, output: output.mul_(3))


def gradient_hook(model):
    model[0].register_forward_hook(lambda module, args, output: output.register_hook(lambda grad: grad * 2) and None)


def full_backward_hook(model):
    model[2].register_full_backward_hook(lambda module, grad_input, grad_output: tuple(g * 2 for g in grad_input))


def old_weight_norm(model):
    nn.utils.weight_norm(model[0])


def pruned(model):
    nn.utils.prune.random_unstructured(model[0], "weight", 0.4)


def another_name(model):
    model.again = model[0]


def shared(model):
    model[4].weight = model[2].weight


ALTERATIONS = [
    replaced_forward,
    replaced_by_another_layer,
    pre_hook,
    hook,
    hook_in_place,
    gradient_hook,
    full_backward_hook,
    old_weight_norm,
    pruned,
    another_name,
    shared,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
@pytest.mark.parametrize("shape", [(4,), (4, 4)])
def test_altered_layers(alter, shape):
    class Model(nn.Sequential):
        def forward(self, x):
            for layer in list(self)[:6]:
                x = layer(x)
            return x.reshape(len(x), -1)[:, :3]

    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()
    model = randomised(Model(*layers))
    alter(model)
    assert_exact(model, torch.randn(N, *shape).double(), torch.randint(0, 3, (N,)))


@contextmanager
def removed(handle):
    try:
        yield
    finally:
        handle.remove()


def scaled_output(module, args, output):
    return output * 3 if isinstance(module, nn.Linear) else None


def scaled_input(module, args):
    return (args[0] * 2,) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules(register):
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with removed(register(scaled_output if register is register_module_forward_hook else scaled_input)):
        assert_exact(model, torch.randn(N, 4).double(), torch.randint(0, 3, (N,)))


class PositionsAndClass(nn.Module):
    """Parameters outside of layers, whose gradients are views of one another."""

    def __init__(self):
        super().__init__()
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 6, 4))
        self.scale, self.head = nn.Parameter(torch.zeros(())), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(torch.tanh(h).mean(1)) * self.scale.exp()


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_parameters_outside_of_layers(batch_size):
    model = randomised(PositionsAndClass())
    x, y = torch.randn(N, 5, 4).double(), torch.randint(0, 3, (N,))
    assert_exact(model, x, y, batch_size=batch_size)
    layout = ParamLayout.from_module(model)
    whole = layout.unflatten(fisher_one_by_one(model, x, y))
    for names in (["position"], ["cls"], ["cls", "head.bias"]):
        expected = torch.cat([whole[name].flatten() for name in layout.names if name in names])
        torch.testing.assert_close(diagonal_fisher(model, (x, y), params=names), expected)


class Experts(nn.Module):
    """Tokens go to one of two layers, which so may have as many rows as there are samples, or none."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = ((tokens[:, 0] > 0) == bool(i)).nonzero().flatten()
            if len(chosen) > 0:
                out = out.index_add(0, chosen, expert(tokens[chosen]))
        return self.head(torch.tanh(out).view(x.shape).mean(1))


@pytest.mark.parametrize(
    "signs",
    [
        [[1, 1], [-1, -1], [1, -1], [1, -1]],  # four tokens each, unevenly spread
        [[1, -1], [1, -1], [1, -1], [1, -1]],  # one of every sample
        [[1, 1], [1, 1], [1, 1], [-1, 1]],
        [[1, 1], [1, 1], [-1, -1], [-1, -1]],
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_experts_with_as_many_tokens_as_samples(signs, batch_size):
    """In batches without a token for one of them, too."""
    x = torch.rand(N, 2, 4).double() + 0.1
    x[..., 0] *= torch.tensor(signs)
    y = torch.randint(0, 3, (N,))

    assert_exact(randomised(Experts()), x, y, batch_size=batch_size)


def test_gradient_layouts_that_pytorch_gets_wrong():
    """A batch normalisation in eval mode of one image, whose gradient comes from tokens: with the channels last."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.token = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.normalised(self.conv(x)).flatten(2).transpose(1, 2)
            return (h + self.token(h)).mean(1)[:, :3]

        def normalised(self, x):
            return self.norm(x)

    class ByFormula(Tokens):
        def normalised(self, x):
            mean, variance, weight, bias = (
                v.view(-1, 1, 1)
                for v in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
            )
            return (x - mean) / (variance + self.norm.eps).sqrt() * weight + bias

    model, exact = randomised(Tokens()), ByFormula().double()
    exact.load_state_dict(model.state_dict())
    x, y = torch.randn(N, 3, 4, 4).double(), torch.randint(0, 3, (N,))
    expected = fisher_one_by_one(exact, x, y)
    for batch_size in (1, 3, None):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), batch_size=batch_size), expected)


class Turned(torch.autograd.Function):
    """Written in Python, and hides nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(1)

    @staticmethod
    def backward(ctx, g):
        return g.flip(1)


class HidesAgain(nn.Module):
    """A second use of a layer, behind a checkpoint of what no parameter was before."""

    def __init__(self, turned):
        super().__init__()
        self.turned, self.layer, self.last = turned, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, hides):
        x = x.detach().requires_grad_()
        hidden = self.layer(x)
        if hides.any():
            hidden = hidden + checkpoint(self.layer, x * 2, use_reentrant=True)
        hidden = hidden.tanh()
        return self.last(Turned.apply(hidden) if self.turned else hidden)


@pytest.mark.parametrize("check", ["off", "first", "all"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_second_use_that_the_graph_does_not_show(turned, check):
    model, x, y = HidesAgain(turned).double(), torch.randn(8, 4).double(), torch.randint(3, (8,))
    hides = torch.arange(8) > 3
    batches = [((x[:4], hides[:4]), y[:4]), ((x[4:], hides[4:]), y[4:])]
    expected = 0
    for i in range(8):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1], hides[i : i + 1]), y[i : i + 1]).backward()
        expected = expected + torch.cat([p.grad.flatten() for p in model.parameters()]).square() / 8
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(diagonal_fisher(model, batches, check=check), expected)
