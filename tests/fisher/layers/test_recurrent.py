"""Recurrent layers with every option, used in every way, against one sample at a time."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.layers.recurrent import Unrolled
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

FEATURES, CLASSES = 3, 4
LAYERS = {
    "LSTM": lambda **options: nn.LSTM(FEATURES, 5, **options),
    "GRU": lambda **options: nn.GRU(FEATURES, 5, **options),
    "RNN": lambda **options: nn.RNN(FEATURES, 5, **options),
}


class Classifier(nn.Module):
    """A map of the input, the layer, and a head on what ``read(outputs, states)`` makes of its results."""

    def __init__(self, layer, read, initial=None):
        super().__init__()
        self.below = nn.Linear(FEATURES, FEATURES)
        self.layer = layer
        self.read = read
        # Initial states learned or computed from the sample.
        count = layer.num_layers * (1 + layer.bidirectional)
        sizes = [getattr(layer, "proj_size", 0) or layer.hidden_size, layer.hidden_size][: 1 + (layer.mode == "LSTM")]
        self.learned = initial and nn.ParameterList(torch.randn(count, 1, size) for size in sizes)
        self.computed = initial == "computed" and nn.ModuleList(nn.Linear(FEATURES, size) for size in sizes)
        self.head = nn.LazyLinear(CLASSES)
        self(torch.zeros(2, 2, FEATURES))

    def states(self, x):
        if not self.learned:
            return None
        n = len(x)
        states = [start.expand(-1, n, -1).contiguous() for start in self.learned]
        if self.computed:
            states = [state + layer(x[:, 0]) for state, layer in zip(states, self.computed, strict=True)]
        return tuple(states) if self.layer.mode == "LSTM" else states[0]

    def results(self, x):
        outputs, states = self.layer(x if self.layer.batch_first else x.transpose(0, 1), self.states(x))
        return (
            outputs if self.layer.batch_first else outputs.transpose(0, 1),
            states if isinstance(states, tuple) else (states,),
        )

    def forward(self, x):
        return self.head(self.read(*self.results(torch.tanh(self.below(x)))))


READINGS = {
    "all outputs": lambda outputs, states: outputs.sum(1),
    "last output": lambda outputs, states: outputs[:, -1],
    "h_n": lambda outputs, states: states[0].transpose(0, 1).flatten(1),
    "last state": lambda outputs, states: states[-1].transpose(0, 1).flatten(1),
    "everything": lambda outputs, states: torch.cat([outputs.amax(1), *(s[-1].sin() for s in states)], 1),
}


@st.composite
def layers(draw):
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, 2))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return kind(FEATURES, draw(st.integers(3, 5)), **options)


def data(n, steps, dtype=torch.float64):
    return torch.randn(n, steps, FEATURES, dtype=dtype), torch.randint(0, CLASSES, (n,))


def assert_same(fisher, expected):
    assert (fisher - expected).norm() <= (1e-10 if fisher.dtype == torch.float64 else 1e-5) * expected.norm()


def fisher_by_maps_alone(monkeypatch, model, samples, **options):
    """Fails where anything is left to gradients of single samples."""
    with monkeypatch.context() as patch:
        patch.setattr(PerSampleGradients, "sum_squares", None)
        return diagonal_fisher(model, samples, **{"check": "off", **options})


@settings(max_examples=150)
@given(
    layer=layers(),
    read=st.sampled_from(list(READINGS)),
    initial=st.sampled_from([None, "learned", "computed"]),
    n=st.integers(1, 4),
    steps=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_every_option(layer, read, initial, n, steps, dtype, seed):
    assume(not (read == "last state" and steps == 1 and getattr(layer, "proj_size", 0)))  # which needs no projection
    torch.manual_seed(seed)
    model = Classifier(layer, READINGS[read], initial).to(dtype)
    x, y = data(n, steps, dtype)
    with pytest.MonkeyPatch.context() as patch:
        fisher = fisher_by_maps_alone(patch, model, (x, y))
    assert fisher.dtype == dtype
    assert_same(fisher, fisher_one_by_one(model, x, y))


@settings(max_examples=100)
@given(layer=layers(), n=st.integers(1, 3), steps=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_outputs_and_gradients_are_those_of_pytorch(layer, n, steps, seed):
    """Also those of the parameters, which a model may ask for itself."""
    torch.manual_seed(seed)
    layer.double()
    x = torch.randn(n, steps, FEATURES, dtype=torch.float64, requires_grad=True)
    x = x if layer.batch_first else x.transpose(0, 1)

    def results():
        outputs, states = layer(x)
        tensors = [outputs, *(states if isinstance(states, tuple) else [states])]
        total = sum((t.sin() * torch.arange(t.numel()).view(t.shape)).sum() for t in tensors)
        return tensors, torch.autograd.grad(total, [x, *layer.parameters()])

    with Unrolled([layer]):
        unrolled, gradients = results()
    expected, expected_gradients = results()
    assert [t.is_contiguous() for t in unrolled] == [t.is_contiguous() for t in expected]
    torch.testing.assert_close(unrolled, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_the_same_numbers(name, monkeypatch):
    torch.manual_seed(0)
    layer = LAYERS[name](num_layers=3, dropout=0.5, bidirectional=True)
    model = Classifier(layer, READINGS["all outputs"]).double().train()
    x, y = data(1, 4)
    torch.manual_seed(1)
    expected = fisher_one_by_one(model, x, y, training=True)
    torch.manual_seed(1)
    fisher = fisher_by_maps_alone(monkeypatch, model, (x, y), eval_mode=False)
    assert_same(fisher, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision(name, dtype, monkeypatch):
    torch.manual_seed(0)
    model = Classifier(LAYERS[name](batch_first=True), READINGS["all outputs"]).to(dtype)
    x, y = data(4, 3, dtype)
    fisher = fisher_by_maps_alone(monkeypatch, model, (x, y))
    expected = fisher_one_by_one(model, x, y)
    assert (fisher - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["empirical", "exact", "sampled"])
def test_kinds(name, kind, monkeypatch):
    torch.manual_seed(0)
    model = Classifier(LAYERS[name](num_layers=2, batch_first=True), READINGS["last output"]).double()
    x, y = data(5, 3)
    with torch.no_grad():
        outputs = model(x)
    options, labels, weights = {}, [y], [torch.ones(5)]
    if kind == "exact":
        labels, weights = [torch.full((5,), c) for c in range(CLASSES)], outputs.softmax(1).unbind(1)
    if kind == "sampled":
        options = {"generator": torch.Generator().manual_seed(1)}
        labels = [outputs.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(1)]
    fisher = fisher_by_maps_alone(monkeypatch, model, (x, y), kind=kind, **options)
    expected = sum(
        weight[i] * fisher_one_by_one(model, x[i : i + 1], label[i : i + 1]) / 5
        for label, weight in zip(labels, weights, strict=True)
        for i in range(5)
    )
    assert_same(fisher, expected)


@pytest.mark.parametrize("check", ["first", "all"])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_differs_in_the_check(name, check, recwarn):
    torch.manual_seed(0)
    model = Classifier(LAYERS[name](), READINGS["everything"])
    x, y = data(6, 3, torch.float32)
    warnings.simplefilter("always")
    assert_same(diagonal_fisher(model, (x, y), check=check, batch_size=2), fisher_one_by_one(model, x, y))
    assert not recwarn.list


@pytest.mark.parametrize("name", LAYERS)
def test_of_another_state_and_some_parameters(name, monkeypatch):
    torch.manual_seed(0)
    model, other = (Classifier(LAYERS[name](num_layers=2), READINGS["all outputs"]).double() for _ in range(2))
    x, y = data(5, 3)
    model.layer.weight_ih_l0.requires_grad_(False)
    wanted = [n for n, _ in model.named_parameters() if n.startswith("layer.") and n != "layer.bias_hh_l1"]
    fisher = fisher_by_maps_alone(monkeypatch, model, (x, y), state=other.state_dict(), params=wanted)
    names = [n for n, _ in other.named_parameters()]
    pieces = fisher_one_by_one(other, x, y).split([p.numel() for p in other.parameters()])
    assert_same(fisher, torch.cat([piece for n, piece in zip(names, pieces, strict=True) if n in wanted]))


class Twice(Classifier):
    def results(self, x):
        return self.layer(self.layer(x)[0][..., :FEATURES])


class SharedWeights(Classifier):
    def __init__(self, layer, read):
        super().__init__(layer, read)
        self.second = type(layer)(FEATURES, layer.hidden_size, batch_first=True)
        self.second.weight_hh_l0 = layer.weight_hh_l0

    def results(self, x):
        outputs, states = super().results(x)
        return outputs + (self.second(x)[0] if hasattr(self, "second") else 0), states


class InPlace(Classifier):
    def results(self, x):
        outputs, states = super().results(x)
        return F.relu_(outputs), states


class EntriesInPlace(Classifier):
    def results(self, x):
        outputs, states = super().results(x)
        outputs[:, 0] *= 2
        return outputs, states


class Checkpointed(Classifier):
    def results(self, x):
        return checkpoint(super().results, x, use_reentrant=False)


class CheckpointedReentrant(Classifier):
    def results(self, x):
        return checkpoint(super().results, x, use_reentrant=True)


class SecondDerivative(Classifier):
    """As networks for energies and forces have it."""

    def results(self, x):
        with torch.enable_grad():
            outputs, states = super().results(x)
            (force,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return torch.cat([outputs, force], -1), states


class FirstDerivative(Classifier):
    def results(self, x):
        outputs, states = super().results(x)
        (weight,) = torch.autograd.grad(outputs.square().sum(), x, retain_graph=True)
        return outputs * weight.detach().sum((1, 2), keepdim=True), states


class Transformed(Classifier):
    def results(self, x):
        force = torch.func.grad(lambda x: self.layer(x)[0].square().sum())(x)
        outputs, states = super().results(x)
        return torch.cat([outputs, force], -1), states


class WithoutGradients(Classifier):
    def results(self, x):
        with torch.no_grad():
            outputs, states = super().results(x)
        return super().results(x)[0] + outputs, states


class Packed(Classifier):
    def results(self, x):
        lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, states = self.layer(packed)
        states = states if isinstance(states, tuple) else (states,)
        return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], states


class Unbatched(Classifier):
    def results(self, x):
        return torch.stack([self.layer(one)[0] for one in x]), ()


USES = [
    Twice,
    SharedWeights,
    InPlace,
    EntriesInPlace,
    Checkpointed,
    CheckpointedReentrant,
    SecondDerivative,
    FirstDerivative,
    Transformed,
    WithoutGradients,
    Packed,
    Unbatched,
]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_uses(use, name, bias, n):
    torch.manual_seed(0)
    model = use(LAYERS[name](batch_first=True, bias=bias), READINGS["all outputs"]).double()
    x, y = data(n, 4)
    fisher = diagonal_fisher(model, (x, y), check="off")
    assert "forward" not in vars(model.layer)
    if use is CheckpointedReentrant:  # which has no gradients of some parameters only
        model.__class__ = Classifier
    assert_same(fisher, fisher_one_by_one(model, x, y))


class EncoderDecoder(Classifier):
    def __init__(self, layer, read):
        super().__init__(layer, read)
        self.decoder = type(layer)(FEATURES, layer.hidden_size, batch_first=True)

    def results(self, x):
        _, states = self.layer(x)
        if not hasattr(self, "decoder"):
            return self.layer(x)
        return self.decoder(x.flip(1), states)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("use", [EncoderDecoder, InPlace, Checkpointed], ids=lambda use: use.__name__)
def test_uses_by_maps_alone(use, name, monkeypatch):
    torch.manual_seed(0)
    model = use(LAYERS[name](batch_first=True), READINGS["all outputs"]).double()
    x, y = data(4, 3)
    assert_same(fisher_by_maps_alone(monkeypatch, model, (x, y)), fisher_one_by_one(model, x, y))


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="PyTorch's own LSTM takes no bfloat16 on this processor"
)
def test_autocast_is_as_ever():
    layer, x = nn.LSTM(FEATURES, 5), torch.randn(3, 2, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)[0]
        with Unrolled([layer]):
            outputs = layer(x)[0]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert outputs.grad_fn.name() == expected.grad_fn.name()


def test_an_own_forward_is_put_back_also_after_an_error():
    layer = nn.GRU(FEATURES, 5)
    own = layer.forward = lambda x, states=None: nn.GRU.forward(layer, 2 * x, states)
    model = Classifier(layer, READINGS["all outputs"])
    x, y = data(3, 2, torch.float32)
    diagonal_fisher(model, (x, y))
    assert vars(layer)["forward"] is own
    with pytest.raises(RuntimeError):
        diagonal_fisher(model, (x.double(), y))
    assert vars(layer)["forward"] is own


def test_the_layers_hide_nothing_from_the_graph(monkeypatch):
    """Their functions are written in Python, but known: no batch is run once more to see."""
    monkeypatch.setattr("fdcr_fast.fisher.estimate.hides_parameters", None)
    diagonal_fisher(
        Classifier(nn.LSTM(FEATURES, 5), lambda outputs, _: outputs[:, -1]),
        (torch.randn(3, 4, FEATURES), torch.tensor([0, 1, 2])),
    )
