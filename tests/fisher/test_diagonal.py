import weakref
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fdcr_fast import ParamLayout, diagonal_fisher
from fdcr_fast.fisher.estimate import Estimate
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_fisher(fisher, expected, tolerance=1e-5):
    assert fisher.shape == expected.shape
    assert (fisher - expected).norm() < tolerance * expected.norm()


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))


def images(n=7):
    return torch.randn(n, 1, 8, 8), torch.randint(0, 5, (n,))


class Transformer(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.randn(12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)
        self.batch_first = batch_first

    def forward(self, tokens):
        h = self.embed(tokens) + self.position[: tokens.shape[1]]
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head(self.encoder(h).mean(1 if self.batch_first else 0))


def test_resnet18_in_eval_mode():
    model = torchvision.models.resnet18(num_classes=5).eval()
    x, y = torch.randn(3, 3, 32, 32), torch.randint(0, 5, (3,))
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


# With 6 samples of 6 or 12 tokens and the tokens first, shapes alone do not tell samples from positions.
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [5, 6, 12])
def test_transformer(batch_first, length):
    model = Transformer(batch_first)
    x, y = torch.randint(0, 20, (6, length)), torch.randint(0, 5, (6,))
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Reuse(nn.Module):
    """One layer called twice, a weight used directly as well, two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.direct = nn.Linear(6, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        h = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        h = torch.tanh(self.direct(h)) @ self.direct.weight
        return self.out(torch.tanh(self.b(torch.tanh(self.a(h)))))


class MergedSamples(nn.Module):
    """Layers that see the samples' parts as a larger batch, and one that sees no sample dimension first."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 4)
        self.across = nn.Linear(4, 4)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        h = torch.tanh(self.part(x.reshape(-1, 2))).reshape(len(x), 3, 4)
        h = torch.tanh(self.across(h.transpose(0, 1))).transpose(0, 1)
        return self.out(h.flatten(1))


class Parametrised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x)))


class WithControlFlow(nn.Module):
    """What vmap cannot do: branch on values."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        h = x * self.scale.exp() if x.sum().item() > 0 else x / self.scale
        return self.out(h)


class LayersOfParameters(nn.Module):
    """Layers applied to parameters and constants, which have as many rows as there may be samples."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.project, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.position = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        keys = torch.tanh(self.norm(self.project(self.table)) + self.position(torch.arange(6)))
        return self.out(torch.tanh(x @ keys))


class PositionsFirst(nn.Module):
    """All layers but one see the samples in another dimension than the first."""

    def __init__(self):
        super().__init__()
        self.lift, self.embed = nn.Linear(1, 3), nn.Embedding(4, 3)
        self.point, self.batch = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.layer, self.rms = nn.LayerNorm(4), nn.RMSNorm(4)
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        h = self.lift(x[:, :, None]).transpose(0, 1) + self.embed((x > 0).long().T)
        h = h.movedim(-1, 1)
        h = torch.tanh(self.batch(self.point(h))).movedim(1, -1)
        return self.out(self.rms(self.layer(h)).mean(0))


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize(
    "model_type", [Reuse, MergedSamples, Parametrised, WithControlFlow, LayersOfParameters, PositionsFirst]
)
def test_models_that_rules_alone_get_wrong(model_type, n):
    model = model_type()
    x, y = torch.randn(n, 6), torch.randint(0, 5, (n,))
    if model_type is WithControlFlow and n > 1:
        x = x.abs()  # the batch as a whole must take the branch of each sample
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


def test_lstm():
    model = Recurrent()
    x, y = torch.randn(4, 3, 4), torch.randint(0, 5, (4,))
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


def test_hooks_that_change_inputs_and_outputs():
    model = small_cnn()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    x, y = images()
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


class Views(nn.Module):
    """Takes contiguous images only: view() of channels last fails."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3), nn.Linear(108, 5)
        self.flat = nn.Linear(128, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x)).reshape(len(x), -1)) + self.flat(x.view(len(x), -1))


@pytest.mark.parametrize("loss", ["cross_entropy", lambda o, t: F.cross_entropy(o, t, reduction="none")])
def test_models_that_take_no_images_with_channels_last(loss):
    model = Views()
    x, y = torch.randn(7, 2, 8, 8), torch.randint(0, 5, (7,))
    assert_fisher(diagonal_fisher(model, (x, y), loss, batch_size=3), fisher_one_by_one(model, x, y))


def test_losses_that_take_no_images_with_channels_last():
    model = nn.Conv2d(2, 5, 3, padding=1)
    x, y = torch.randn(4, 2, 6, 6), torch.randn(4, 5, 6, 6)
    fisher = diagonal_fisher(model, (x, y), lambda o, t: (o.view(len(o), -1) - t.view(len(t), -1)).square().sum(1))
    assert_fisher(fisher, fisher_one_by_one(model, x, y, lambda o, t: (o - t).square().sum()))


def test_batches_are_one_data_set():
    model = small_cnn()
    x, y = images(11)
    whole = diagonal_fisher(model, (x, y))
    assert_fisher(diagonal_fisher(model, (x, y), batch_size=3), whole)
    assert_fisher(diagonal_fisher(model, [(x[:5], y[:5]), (x[5:], y[5:])]), whole)
    assert_fisher(diagonal_fisher(model, DataLoader(TensorDataset(x, y), batch_size=4)), whole)
    assert_fisher(diagonal_fisher(model, [(x, y), (x[:0], y[:0])]), whole)


def test_order_and_subset_of_parameters():
    model = small_cnn()
    data = images()
    layout = ParamLayout.from_module(model)
    whole = layout.unflatten(diagonal_fisher(model, data))
    assert layout.numel == sum(f.numel() for f in whole.values())
    for names in (["4.bias"], ["4.weight", "0.bias"], layout.names):
        part = diagonal_fisher(model, data, params=names)
        expected = torch.cat([whole[name].flatten() for name in layout.names if name in names])
        torch.testing.assert_close(part, expected)


def test_frozen_parameters_have_a_fisher_like_all_others():
    model = small_cnn()
    data = images()
    expected = diagonal_fisher(model, data)
    model.requires_grad_(False)
    torch.testing.assert_close(diagonal_fisher(model, data), expected)
    assert not any(p.requires_grad for p in model.parameters())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(4, 5)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_several_inputs(form):
    model = TwoInputs()
    left, right, y = torch.randn(6, 3), torch.randn(6, 4), torch.randint(0, 5, (6,))
    inputs = (left, right) if form == "tuple" else {"right": right, "left": left}
    assert_fisher(diagonal_fisher(model, (inputs, y)), fisher_one_by_one(model, inputs, y))


LOSS_CASES = {
    "cross_entropy": (torch.randint(0, 5, (6,)), lambda o, t: F.cross_entropy(o, t, reduction="sum")),
    "nll": (torch.randint(0, 5, (6,)), lambda o, t: F.nll_loss(o, t, reduction="sum")),
    "mse": (torch.randn(6, 5), lambda o, t: ((o - t) ** 2).sum()),
    "bce_with_logits": (
        torch.rand(6, 5),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="sum"),
    ),
}


@pytest.mark.parametrize("loss", LOSS_CASES)
def test_losses_by_name(loss):
    model = nn.Linear(4, 5)
    targets, summed = LOSS_CASES[loss]
    x = torch.randn(6, 4)
    assert_fisher(diagonal_fisher(model, (x, targets), loss), fisher_one_by_one(model, x, targets, summed))


def test_every_loss_has_a_case():
    from fdcr_fast.fisher.losses import LOSSES

    assert set(LOSS_CASES) == set(LOSSES)


def test_dense_cross_entropy_sums_over_positions():
    model = nn.Conv2d(2, 5, 1)
    x, y = torch.randn(3, 2, 4, 4), torch.randint(0, 5, (3, 4, 4))
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


def test_callable_loss():
    model = nn.Linear(4, 5)
    x, y = torch.randn(6, 4), torch.randn(6, 5)
    fisher = diagonal_fisher(model, (x, y), lambda o, t: (o - t).abs().sum(1))
    assert_fisher(fisher, fisher_one_by_one(model, x, y, lambda o, t: (o - t).abs().sum()))


def test_float64_models():
    model = small_cnn().double()
    x, y = images()
    fisher = diagonal_fisher(model, (x.double(), y))
    assert fisher.dtype == torch.float64
    assert_fisher(fisher, fisher_one_by_one(model, x, y), 1e-12)


def test_embedding_and_norm_in_bfloat16():
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Tanh(), nn.RMSNorm(8), nn.Flatten(), nn.Linear(40, 5))
    model.to(torch.bfloat16)
    x, y = torch.randint(0, 9, (20, 5)), torch.randint(0, 5, (20,))
    fisher = diagonal_fisher(model, (x, y))
    assert fisher.dtype == torch.float32
    assert_fisher(fisher.double(), fisher_one_by_one(model, x, y), 2e-2)


def test_float64_is_exact_beyond_float32():
    model = Transformer().double()
    x, y = torch.randint(0, 20, (4, 7)), torch.randint(0, 5, (4,))
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y), 1e-12)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_contexts_without_gradients(context):
    model = small_cnn()
    data = images()
    expected = diagonal_fisher(model, data)
    with context():
        torch.testing.assert_close(diagonal_fisher(model, data), expected)


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_a_layer(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def compile_a_function(model):
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    return model


@pytest.mark.parametrize("how", [compile_whole, compile_in_place, compile_a_layer, compile_a_function])
@pytest.mark.parametrize("warm", [True, False])
def test_compiled_models(how, warm):
    model = small_cnn().eval()
    data = images()
    expected = diagonal_fisher(model, data)
    compiled = how(model)
    if warm:
        compiled(data[0])
    torch.testing.assert_close(diagonal_fisher(compiled, data), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", [small_cnn, Transformer])
def test_under_autocast(dtype, model_type):
    model = model_type().eval()
    x = images()[0] if model_type is small_cnn else torch.randint(0, 20, (7, 6))
    y = torch.randint(0, 5, (7,))
    exact = diagonal_fisher(model, (x, y))
    expected = 0
    with torch.autocast("cpu", dtype=dtype):
        fisher = diagonal_fisher(model, (x, y))
        for xi, yi in zip(x.split(1), y.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(xi), yi), list(model.parameters()))
            expected = expected + torch.cat([g.flatten() for g in grads]) ** 2 / 7
    assert fisher.dtype == torch.float32
    assert_fisher(fisher, expected, 1e-2)
    assert (fisher - exact).norm() > 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model = small_cnn()
    x, y = images()
    expected = fisher_one_by_one(model, x, y)
    fisher = diagonal_fisher(model.to(dtype), (x.to(dtype), y))
    assert fisher.dtype == torch.float32
    assert_fisher(fisher.double(), expected, 5e-2)


def test_progress():
    done = []
    x, y = images(11)
    diagonal_fisher(small_cnn(), [(x[:7], y[:7]), (x[:0], y[:0]), (x[7:], y[7:])], batch_size=4, progress=done.append)
    assert done == [4, 7, 11]


class LanguageModel(nn.Module):
    """Called and answering as Hugging Face's are."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.head(torch.tanh(h).sum(1)), "hidden_states": (h,)}


def test_mappings_of_inputs_labels_and_outputs():
    model = LanguageModel()
    ids, mask = torch.randint(0, 20, (6, 4)), torch.randint(0, 2, (6, 4))
    mask[:, 0] = 1
    y = torch.randint(0, 5, (6,))
    batch = UserDict(input_ids=ids, attention_mask=mask, labels=y)

    def loss(output, target):
        return F.cross_entropy(output["logits"], target, reduction="sum")

    expected = fisher_one_by_one(model, {"input_ids": ids, "attention_mask": mask}, y, loss)
    assert_fisher(diagonal_fisher(model, batch), expected)
    assert_fisher(diagonal_fisher(model, [batch, batch], batch_size=4), expected)
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        **LanguageModel.forward(model, input_ids, attention_mask)
    )
    assert_fisher(diagonal_fisher(model, batch), expected)
    model.forward = lambda input_ids, attention_mask: (model.embed(input_ids), model.head(model.embed(input_ids)))
    with pytest.raises(ValueError, match="whose output is a tensor or has logits, got tuple"):
        diagonal_fisher(model, batch)


@pytest.mark.parametrize("passes", [1, 3])
def test_inputs_and_gradients_are_dropped_while_the_backward_pass_runs(monkeypatch, passes):
    """No more than one layer's gradient is alive at a time, and no input of a layer that is done with."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    alive = []
    visited = []

    def add_part(self, parts, rows, share, last, added, name, grad):
        assert [ref for ref in alive if ref() is not None] == []
        original(self, parts, rows, share, last, added, name, grad)
        alive.append(weakref.ref(grad))
        if last:
            assert name not in parts
        visited.append(name)

    original = Estimate._add_part
    monkeypatch.setattr(Estimate, "_add_part", add_part)
    data = torch.randn(5, 6), torch.randint(0, 6, (5,))
    diagonal_fisher(model, data, kind="sampled", num_samples=passes, check="off")
    assert visited == ["3", "2", "1", "0"] * passes


def test_fallback_in_chunks(monkeypatch):
    model = Transformer()
    x, y = torch.randint(0, 20, (5, 7)), torch.randint(0, 5, (5,))
    monkeypatch.setattr("fdcr_fast.fisher.per_sample._MAX_BYTES", 2 * 4 * 5000)
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))


def state(model):
    return (
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [(p.grad, p.requires_grad, p._version) for p in model.parameters()],
    )


def test_leaves_the_model_as_it_was():
    model = Transformer().train()
    model.encoder.layers[0].eval()
    x, y = torch.randint(0, 20, (4, 7)), torch.randint(0, 5, (4,))
    before, rng = state(model), torch.get_rng_state()
    diagonal_fisher(model, (x, y))
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(IndexError):
        diagonal_fisher(model, [(x, y), (x + 1000, y)])
    assert state(model) == before


def test_dropout_only_where_asked_for():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 5)).train()
    data = torch.randn(8, 4), torch.randint(0, 5, (8,))
    torch.testing.assert_close(diagonal_fisher(model, data), diagonal_fisher(model, data))
    noisy = [diagonal_fisher(model, data, eval_mode=False) for _ in range(2)]
    assert not torch.allclose(*noisy)


def test_parameter_without_gradient_path_is_named():
    class Forgotten(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.forgotten = nn.Linear(3, 5), nn.Linear(3, 5)
            self.blocked = nn.Linear(3, 5)

        def forward(self, x):
            with torch.no_grad():
                offset = self.blocked(x)
            return self.used(x) + offset

    data = torch.randn(4, 3), torch.randint(0, 5, (4,))
    with pytest.raises(ValueError, match=r"forgotten\.weight, forgotten\.bias, blocked\.weight, blocked\.bias"):
        diagonal_fisher(Forgotten(), data)
    assert diagonal_fisher(Forgotten(), data, params=["used.bias"]).shape == (5,)


@pytest.mark.parametrize("track", [True, False])
def test_batch_statistics_are_refused(track):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=track))
    data = torch.randn(4, 3), torch.randint(0, 5, (4,))
    with pytest.raises(ValueError, match="1 normalises with the statistics of the batch"):
        diagonal_fisher(model, data, eval_mode=not track)
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: diagonal_fisher(m, (x[:0], y[:0])), "no samples"),
        (lambda m, x, y: diagonal_fisher(m, []), "no samples"),
        (lambda m, x, y: diagonal_fisher(m, (x, y), "hinge"), "unknown loss 'hinge'"),
        (lambda m, x, y: diagonal_fisher(m, (x, y), lambda o, t: o.sum()), r"one value per sample, \[6\], got \(\)"),
        (lambda m, x, y: diagonal_fisher(m, (x, y), params=["weigth"]), "no parameter weigth; it has weight, bias"),
        (lambda m, x, y: diagonal_fisher(m, (x, y), params=[]), "no parameters"),
        (lambda m, x, y: diagonal_fisher(nn.ReLU(), (x, y)), "no parameters"),
        (lambda m, x, y: diagonal_fisher(m, [x, x, x]), "expected batches"),
        (lambda m, x, y: diagonal_fisher(m, (x, y), batch_size=0), "batch_size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(4, 5), torch.randn(6, 4), torch.randint(0, 5, (6,)))


def test_the_models_own_errors_come_through():
    with pytest.raises(RuntimeError, match="shapes"):
        diagonal_fisher(nn.Linear(4, 5), (torch.randn(6, 3), torch.randint(0, 5, (6,))))


def test_one_sample_at_a_time_where_vmap_fails(caplog):
    caplog.set_level("INFO", logger="fdcr_fast")
    x, y = torch.randn(3, 6).abs(), torch.randint(0, 5, (3,))
    model = WithControlFlow()
    assert_fisher(diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y))
    assert caplog.text.count("one sample at a time") == 1


def test_rules_are_used_where_they_can_be(monkeypatch):
    monkeypatch.setattr(PerSampleGradients, "sum_squares", None)
    model = small_cnn()
    data = images()
    assert diagonal_fisher(model, data).shape == (ParamLayout.from_module(model).numel,)
