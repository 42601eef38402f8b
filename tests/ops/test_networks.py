import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import ops
from fdcr_fast.ops import networks
from fdcr_fast.ops.networks import NetworkLayer


def dyadic(generator, shape, scale):
    """Small multiples of a power of two: all sums of products are exact in float32, so that ties are ties."""
    return torch.randint(-3, 4, shape, generator=generator) * 2.0**-scale


@st.composite
def problems(draw, most=90):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels, size = draw(st.integers(1, 3)), [draw(st.integers(3, 11)), draw(st.integers(3, 11))]
    M, B = draw(st.integers(1, 70)), draw(st.integers(0, draw(st.sampled_from([5, most]))))
    images = dyadic(generator, (M, channels, *size), 2)
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    layers, params = [], []

    def add(layer, kernel):
        nonlocal channels
        fan_in = channels * math.prod(kernel)
        params.append(dyadic(generator, (layer.out_channels * fan_in,), 1 + round(math.log2(fan_in) / 2)))
        if layer.bias:
            params.append(dyadic(generator, (layer.out_channels,), 2))
        layers.append(layer)
        channels = layer.out_channels

    for _ in range(draw(st.integers(0, 2))):
        padding = [draw(st.integers(0, 2)) for _ in size]
        kernel = [draw(st.integers(1, min(5, s + 2 * p))) for s, p in zip(size, padding, strict=True)]
        after = [s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel, strict=True)]
        pool = min(after) > 1 and draw(st.booleans())
        flags = [int(pool), int(draw(st.booleans())), int(draw(st.booleans()))]
        add(NetworkLayer(draw(st.integers(1, 17)), *kernel, *padding, *flags), kernel)
        size = [s // 2 if pool else s for s in after]
    for _ in range(draw(st.integers(0, 2))):
        add(NetworkLayer(draw(st.integers(1, 70)), relu=int(draw(st.booleans()))), size)
        size = [1, 1]
    add(NetworkLayer(draw(st.integers(2, 100)), bias=int(draw(st.booleans()))), size)
    labels = torch.randint(channels, (M,), generator=generator)
    rows = torch.randint(M, (B,), generator=generator)
    return torch.cat(params), images, labels, rows, layers


def flat(layers):
    return [number for layer in layers for number in layer]


def by_autograd(params, images, layers):
    """The logits in float64."""
    x = images.double()
    for layer in layers:
        kernel = [k or s for k, s in zip(layer[1:3], x.shape[2:], strict=True)]
        shape = (layer.out_channels, x.shape[1], *kernel)
        weight, params = params[: math.prod(shape)], params[math.prod(shape) :]
        bias = params[: layer.out_channels] if layer.bias else None
        params = params[layer.out_channels * layer.bias :]
        x = F.conv2d(x, weight.view(shape), bias, padding=layer[3:5])
        x = x.relu() if layer.relu else x
        x = F.max_pool2d(x, 2) if layer.pool else x
    return x.flatten(1)


def close(got, expected):
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    return (got.double() - expected).norm() <= 3e-6 * expected.norm() + 1e-12


@settings(max_examples=settings.default.max_examples // 2)
@given(problem=problems())
def test_outputs_and_gradient(implementation, problem):
    params, images, labels, rows, layers = problem
    w = params.double().requires_grad_()
    z = by_autograd(w, images[rows], layers)
    assert close(implementation("network_outputs")(params, images, rows, flat(layers)), z)
    loss, grad = implementation("network_grad")(params, images, labels, rows, flat(layers))
    mean = F.cross_entropy(z, labels[rows])
    torch.testing.assert_close(loss.double(), mean, rtol=1e-5, atol=1e-6, equal_nan=True)
    expected = torch.autograd.grad(mean, w)[0] if len(rows) else torch.zeros_like(w)
    assert close(grad, expected)


@settings(max_examples=settings.default.max_examples // 4)
@given(problem=problems(most=17))
def test_squares_of_single_gradients(implementation, problem):
    params, images, labels, rows, layers = problem
    w = params.double().requires_grad_()
    expected = torch.zeros_like(w)
    for row in rows.tolist():
        loss = F.cross_entropy(by_autograd(w, images[row : row + 1], layers), labels[row : row + 1])
        expected += torch.autograd.grad(loss, w)[0] ** 2
    assert close(implementation("sum_squared_network_grads")(params, images, labels, rows, flat(layers)), expected)


CNN = [NetworkLayer(6, 5, 5, pool=1, relu=1), NetworkLayer(9, 3, 3, 1, 1, relu=1), NetworkLayer(33), NetworkLayer(5)]


def cnn(M):
    torch.manual_seed(0)
    sizes = [s.weight[0] * math.prod(s.weight[1:]) + s.weight[0] for s in networks.sized_layers(flat(CNN), (2, 12, 13))]
    return torch.randn(sum(sizes)) * 0.1, torch.randn(M, 2, 12, 13), torch.randint(5, (M,)), torch.randperm(M)


@pytest.mark.parametrize("n", [64, 1300])
def test_the_number_of_threads_changes_no_bit(compiled, n):
    params, images, labels, rows = cnn(n)

    def everything():
        return (
            compiled("network_outputs")(params, images, rows, flat(CNN)),
            *compiled("network_grad")(params, images, labels, rows, flat(CNN)),
            compiled("sum_squared_network_grads")(params, images, labels, rows, flat(CNN)),
        )

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    w = params.double().requires_grad_()
    loss = F.cross_entropy(by_autograd(w, images[rows], CNN), labels[rows])
    assert close(results[0][2], torch.autograd.grad(loss, w)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(implementation, bad):
    params, images, labels, rows = cnn(40)
    images[rows[17], 1, 5, 5] = bad
    outputs = implementation("network_outputs")(params, images, rows, flat(CNN))
    assert (~outputs.isfinite()).any(1).tolist() == [i == 17 for i in range(40)]
    loss, grad = implementation("network_grad")(params, images, labels, rows, flat(CNN))
    assert not loss.isfinite()
    fisher = implementation("sum_squared_network_grads")(params, images, labels, rows, flat(CNN))
    assert grad.isnan().double().mean() > 0.9
    assert fisher.isnan().double().mean() > 0.9
    images[rows[17], 1, 5, 5] = 0
    params[3] = bad
    assert not implementation("network_grad")(params, images, labels, rows, flat(CNN))[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (100_001,)])
@pytest.mark.parametrize(("lr", "momentum", "decay"), [(0.1, 0.9, 1e-2), (0.5, 0.0, 0.0)])
def test_sgd(implementation, shape, lr, momentum, decay):
    torch.manual_seed(0)
    w, v, g = torch.randn(3, *shape)
    strided = torch.stack([g, g], 1)[:, 0]
    velocity = momentum * v.double() + g.double() + decay * w.double()
    expected = w.double() - lr * velocity
    implementation("sgd_step")(w, v, strided, lr, momentum, decay)
    torch.testing.assert_close(v.double(), velocity, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=settings.default.max_examples // 4)
@given(problem=problems(), data=st.data())
def test_training_is_steps_after_steps(implementation, problem, data):
    params, images, labels, rows, layers = problem
    epochs, batch_size = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 100))
    order = torch.stack([rows.roll(i) for i in range(epochs)], 1).T if epochs else rows.new_empty(0, 3)
    kept = params.clone()
    trained = implementation("train_network")(params, images, labels, order, flat(layers), batch_size, 0.01, 0.9, 1e-3)
    assert torch.equal(params, kept)
    velocity = torch.zeros_like(params)
    for epoch in order:
        for first in range(0, len(epoch), batch_size):
            batch = epoch[first : first + batch_size]
            grad = implementation("network_grad")(params, images, labels, batch, flat(layers))[1]
            implementation("sgd_step")(params, velocity, grad, 0.01, 0.9, 1e-3)
    torch.testing.assert_close(trained, params, rtol=0, atol=0, equal_nan=True)  # some of these diverge


def test_what_does_not_fit_is_refused():
    params, images, labels, rows = cnn(8)
    for layers, message in [
        ([], "layers of 8 numbers"),
        (flat(CNN)[:-1], "layers of 8 numbers"),
        (flat(CNN[:-1]), "parameters"),
        (flat(CNN[:2]), "pixels instead of one"),
        (flat([NetworkLayer(6, 13, 13), *CNN[1:]]), "does not fit"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            networks.network_outputs(params.to("meta"), images.to("meta"), rows.to("meta"), layers)
        with pytest.raises(RuntimeError):
            networks.network_outputs(params, images, rows, layers)
    for args in [
        (params[1:], images, labels, rows),
        (params.double(), images, labels, rows),
        (params, images.double(), labels, rows),
        (params, images[0], labels, rows),
        (params, images, labels[1:], rows),
        (params, images, labels, rows + 1),
        (params, images, labels + 5, rows),
    ]:
        with pytest.raises((RuntimeError, IndexError)):
            networks.network_grad(*args, flat(CNN))
    for order, batch_size in [(rows, 4), (rows[None] + 1, 4), (rows[None], 0)]:
        with pytest.raises((RuntimeError, IndexError)):
            networks.train_network(params, images, labels, order, flat(CNN), batch_size, 0.1, 0.9, 0.0)
    with pytest.raises(RuntimeError):
        networks.sgd_step(params, params[1:], params, 0.1, 0.9, 0.0)


def test_their_old_place_gives_them_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"fdcr_fast\.ops\.networks\.network_grad"):
        assert ops.network_grad is networks.network_grad
    with pytest.raises(AttributeError, match="no attribute 'network_loss'"):
        _ = ops.network_loss
