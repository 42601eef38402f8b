"""Every layer rule in a small model, with awkward options and layouts, against one sample at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_by_one import fisher_one_by_one
from torch import nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.importance import rules
from fdcr_fast.importance.per_sample import PerSampleGradients


class PooledClassifier(nn.Module):
    """A layer between a pointwise nonlinearity and a pooled linear head; the input's sample dimension comes first."""

    def __init__(self, layer, features, channels_dim):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 3)
        self.channels_dim = channels_dim

    def forward(self, x):
        h = torch.tanh(self.layer(x)).movedim(self.channels_dim, 1)
        return self.head(h.flatten(2).mean(2) if h.dim() > 2 else h)


@st.composite
def linear_cases(draw):
    in_, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = draw(st.lists(st.integers(1, 5), max_size=2))
    layer = nn.Linear(in_, out, bias=draw(st.booleans()))
    return PooledClassifier(layer, out, -1), (*shape, in_)


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
        return PooledClassifier(layer, channels[1], 1), (channels[0], *size)

    return cases()


CASES = {
    nn.Linear: linear_cases(),
    nn.Conv1d: convolution_cases(1),
    nn.Conv2d: convolution_cases(2),
    nn.Conv3d: convolution_cases(3),
}


def test_every_rule_has_a_case():
    assert set(CASES) == set(rules.RULES)


@pytest.mark.parametrize("layer", CASES, ids=lambda layer: layer.__name__)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(data=st.data())
def test_rule_against_one_sample_at_a_time(layer, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    model, shape = data.draw(CASES[layer])
    n = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    model.to(dtype)
    x, y = torch.randn(n, *shape, dtype=dtype), torch.randint(0, 3, (n,))
    if data.draw(st.booleans()) and x.dim() >= 3:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with pytest.MonkeyPatch.context() as patch:
        # The rule alone: what falls back would make this test pass without it.
        patch.setattr(PerSampleGradients, "sum_squares", None)
        fisher = diagonal_fisher(model, (x, y))
    expected = fisher_one_by_one(model, x, y)
    assert fisher.dtype == dtype
    assert (fisher - expected).norm() <= 1e-5 * expected.norm() + 1e-30
