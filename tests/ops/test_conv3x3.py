import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.ops.conv3x3 import CHANNELS

NAMES = ("conv3x3", "conv3x3_input_grad", "conv3x3_weight_grad")


def integers(generator, *shape):
    """All that is computed of these is exact in float32, halves and quarters of filters included."""
    return torch.randint(-3, 4, shape, generator=generator).float()


@st.composite
def problems(draw, numbers=integers):
    """Input, weight and gradient at the output."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    samples, height, width = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        samples = 40  # of more tiles than are taken at once
    ins, outs = (CHANNELS * draw(st.integers(1, 9)) for _ in range(2))
    shapes = (samples, height, width, ins), (outs, 3, 3, ins), (samples, height, width, outs)
    return [numbers(generator, *shape) for shape in shapes]


def definition(input, weight, grad):
    """The convolution and the gradients at its input and weight, by autograd in float64."""
    x, w = input.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    return [y.detach(), *torch.autograd.grad(y, (x, w), grad.double())]


def by_operators(implementation, input, weight, grad):
    conv, input_grad, weight_grad = map(implementation, NAMES)
    return [conv(input, weight), input_grad(grad, weight), weight_grad(grad, input)]


@settings(max_examples=settings.default.max_examples // 2)
@given(problem=problems())
def test_integers_are_exact(implementation, problem):
    for got, expected in zip(by_operators(implementation, *problem), definition(*problem), strict=True):
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize(("samples", "size", "channels"), [(8, 16, 64), (4, 8, 256), (64, 7, 48)])
def test_as_accurate_as_the_definition_in_float32(compiled, samples, size, channels):
    generator = torch.Generator().manual_seed(0)
    shapes = (samples, size, size, channels), (channels, 3, 3, channels), (samples, size, size, channels)
    problem = [torch.randn(*shape, generator=generator) for shape in shapes]
    x, w = (tensor.clone().requires_grad_() for tensor in problem[:2])
    y = F.conv2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    plain = [y.detach(), *torch.autograd.grad(y, (x, w), problem[2])]
    for name, got, single, expected in zip(
        NAMES, by_operators(compiled, *problem), plain, definition(*problem), strict=True
    ):
        error, of_single = ((found - expected).norm() / expected.norm() for found in (got, single))
        assert error < 1e-6, name
        assert error < 4 * of_single, name


def test_the_number_of_threads_changes_no_bit(compiled):
    generator = torch.Generator().manual_seed(0)
    problem = [torch.randn(*shape, generator=generator) for shape in ((9, 11, 8, 80), (48, 3, 3, 80), (9, 11, 8, 48))]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(by_operators(compiled, *problem))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_any_strides(compiled):
    generator = torch.Generator().manual_seed(0)
    problem = [integers(generator, *shape) for shape in ((2, 5, 6, 32), (16, 3, 3, 32), (2, 5, 6, 16))]
    strided = [tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for tensor in problem]
    assert not any(tensor.is_contiguous() for tensor in strided)
    for got, expected in zip(by_operators(compiled, *strided), definition(*problem), strict=True):
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(compiled, name):
    image, weight = torch.zeros(2, 4, 4, 16), torch.zeros(16, 3, 3, 16)
    other = image if name == "conv3x3_weight_grad" else weight
    wrong = [
        (torch.zeros(2, 4, 4, 8), other),
        (torch.zeros(2, 4, 4, 0), other),
        (torch.zeros(2, 4, 16), other),
        (image.double(), other),
        (image, other.double()),
        (image, torch.zeros(16, 5, 5, 32)),
    ]
    for args in wrong:
        with pytest.raises((RuntimeError, ValueError)):
            compiled(name)(*args)
