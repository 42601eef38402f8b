"""Every layer rule in a small model, with awkward options and layouts, against one sample at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.layers import RULES
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one


class PooledClassifier(nn.Module):
    """A layer, a pointwise nonlinearity and a pooled linear head; the input's sample dimension comes first."""

    def __init__(self, layer, features, channels_dim):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 3)
        self.channels_dim = channels_dim

    def forward(self, x):
        h = torch.tanh(self.layer(x)).movedim(self.channels_dim, 1)
        return self.head(h.flatten(2).mean(2) if h.dim() > 2 else h)


def normal(*shape):
    """Random inputs of that shape for n samples."""
    return lambda n, dtype: torch.randn(n, *shape, dtype=dtype)


@st.composite
def linear_cases(draw):
    in_, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = draw(st.lists(st.integers(1, 5), max_size=2))
    layer = nn.Linear(in_, out, bias=draw(st.booleans()))
    return PooledClassifier(layer, out, -1), normal(*shape, in_)


def convolution_cases(dims):
    @st.composite
    def cases(draw):
        groups = draw(st.integers(1, 2))
        channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        numbers = st.tuples(*[st.integers(1, 3)] * dims)
        kernel, dilation = draw(numbers), draw(numbers)
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from(["same", "valid", 0, 1, (0, 1, 0)[:dims]]))
        stride = 1 if padding == "same" else draw(numbers)
        size = [d * (k - 1) + 3 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)]
        layer = getattr(nn, f"Conv{dims}d")(
            *channels, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
        )
        return PooledClassifier(layer, channels[1], 1), normal(channels[0], *size)

    return cases()


def transposed_convolution_cases(dims):
    @st.composite
    def cases(draw):
        groups = draw(st.integers(1, 2))
        channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        kernel, stride, dilation, size = (draw(st.tuples(*[st.integers(1, 3)] * dims)) for _ in range(4))
        output_padding = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        length = [
            (n - 1) * s + d * (k - 1) + 1 + o
            for n, s, d, k, o in zip(size, stride, dilation, kernel, output_padding, strict=True)
        ]
        padding = [draw(st.integers(0, min(3, (n - 1) // 2))) for n in length]
        layer = getattr(nn, f"ConvTranspose{dims}d")(
            *channels, kernel, stride, padding, output_padding, groups, draw(st.booleans()), dilation
        )
        return PooledClassifier(layer, channels[1], 1), normal(channels[0], *size)

    return cases()


@st.composite
def embedding_cases(draw):
    num, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = draw(st.lists(st.integers(1, 6), max_size=2))
    layer = nn.Embedding(
        num,
        width,
        padding_idx=draw(st.none() | st.integers(0, num - 1)),
        max_norm=draw(st.sampled_from([None, 0.5])),
        **draw(st.sampled_from([{}, {"scale_grad_by_freq": True}, {"sparse": True}])),
    )
    integer = draw(st.sampled_from([torch.int64, torch.int32]))
    return PooledClassifier(layer, width, -1), lambda n, _: torch.randint(num, (n, *shape)).to(integer)


def randomise(layer):
    """Parameters and running statistics away from their initial zeros and ones."""
    with torch.no_grad():
        for x in (*layer.parameters(), *layer.buffers()):
            if x.is_floating_point():
                x.uniform_(0.5, 2)
    return layer


@st.composite
def last_dimension_norm_cases(draw, layer_type):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    positions = draw(st.lists(st.integers(1, 4), max_size=2))
    options = {"bias": draw(st.booleans())} if layer_type is nn.LayerNorm else {}
    layer = layer_type(shape, draw(st.sampled_from([1e-5, 0.1])), **options)
    return PooledClassifier(randomise(layer), shape[-1], -1), normal(*positions, *shape)


@st.composite
def group_norm_cases(draw):
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(2, 4))
    pixels = draw(st.lists(st.integers(1, 4), max_size=3))
    layer = randomise(nn.GroupNorm(groups, channels, draw(st.sampled_from([1e-5, 0.1]))))
    return PooledClassifier(layer, channels, 1), normal(channels, *pixels)


@st.composite
def channel_norm_cases(draw, layer_type, dims):
    channels = draw(st.integers(1, 7))
    instance = layer_type in INSTANCE_NORMS
    options = {"affine": True, "track_running_stats": draw(st.booleans())} if instance else {}
    layer = randomise(layer_type(channels, draw(st.sampled_from([1e-5, 0.1])), **options))
    pixels = draw(st.lists(st.integers(2, 4), min_size=dims, max_size=dims))
    if layer_type is nn.BatchNorm1d and draw(st.booleans()):
        pixels = []
    return PooledClassifier(layer, channels, 1), normal(channels, *pixels)


INSTANCE_NORMS = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]

CASES = {
    nn.Linear: linear_cases(),
    nn.Conv1d: convolution_cases(1),
    nn.Conv2d: convolution_cases(2),
    nn.Conv3d: convolution_cases(3),
    nn.ConvTranspose1d: transposed_convolution_cases(1),
    nn.ConvTranspose2d: transposed_convolution_cases(2),
    nn.ConvTranspose3d: transposed_convolution_cases(3),
    nn.Embedding: embedding_cases(),
    nn.LayerNorm: last_dimension_norm_cases(nn.LayerNorm),
    nn.RMSNorm: last_dimension_norm_cases(nn.RMSNorm),
    nn.GroupNorm: group_norm_cases(),
    **{t: channel_norm_cases(t, d) for types in (INSTANCE_NORMS, BATCH_NORMS) for d, t in enumerate(types, 1)},
}


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("layer", CASES, ids=lambda layer: layer.__name__)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=25)
@given(data=st.data())
def test_rule_against_one_sample_at_a_time(layer, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    model, inputs = data.draw(CASES[layer])
    n = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    model.to(dtype)
    x, y = inputs(n, dtype), torch.randint(0, 3, (n,))
    if data.draw(st.booleans()) and x.dim() >= 3:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with pytest.MonkeyPatch.context() as patch:
        # The rule alone: what falls back would make this test pass without it.
        patch.setattr(PerSampleGradients, "sum_squares", None)
        fisher = diagonal_fisher(model, (x, y), check="off")  # which would not trust a gradient of rounding alone
    expected = fisher_one_by_one(model, x, y)
    assert fisher.dtype == dtype
    assert (fisher - expected).norm() <= 1e-5 * expected.norm() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_without_eps_takes_that_of_the_dtype(dtype):
    """Not in CASES: without eps the float64 copy of a float32 model is another function."""
    torch.manual_seed(0)
    x, y = 1e-3 * torch.randn(5, 4, dtype=dtype), torch.randint(0, 4, (5,))
    given = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    fishers = [diagonal_fisher(nn.RMSNorm(4, eps, dtype=dtype), (x, y)) for eps in (None, given)]
    torch.testing.assert_close(*fishers, rtol=0, atol=0)
    assert not torch.allclose(fishers[0], diagonal_fisher(nn.RMSNorm(4, 1e-3, dtype=dtype), (x, y)))


NORMS_WITHOUT_PARAMETERS = {
    "LayerNorm": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(4, elementwise_affine=False),
    "GroupNorm": lambda: nn.GroupNorm(1, 6, affine=False),
    "BatchNorm": lambda: nn.BatchNorm1d(6, affine=False),
    "InstanceNorm": lambda: nn.InstanceNorm1d(6),
}


@pytest.mark.parametrize("norm", NORMS_WITHOUT_PARAMETERS.values(), ids=list(NORMS_WITHOUT_PARAMETERS))
def test_norms_without_parameters(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randn(5, 2, 4), torch.randint(0, 3, (5,))
    expected = fisher_one_by_one(model, x, y)
    assert (diagonal_fisher(model, (x, y)) - expected).norm() < 1e-5 * expected.norm()
