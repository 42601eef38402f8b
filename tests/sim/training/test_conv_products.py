"""Convolutions as one product: outputs and gradients beside float64, and which convolutions become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdcr_fast import _native
from fdcr_fast.sim.training import convolutions
from fdcr_fast.sim.training.convolutions import conv_product, fast_convolutions

SHAPES = [  # of images, filters' taps, stride, padding
    ((2, 5, 4, 4), (3, 3), (1, 1), (1, 1)),
    ((3, 5, 8, 7), (3, 3), (2, 2), (1, 1)),
    ((2, 5, 8, 8), (1, 1), (2, 2), (0, 0)),
    ((2, 5, 6, 9), (2, 3), (1, 3), (2, 0)),
    ((1, 1, 3, 3), (3, 3), (5, 5), (0, 0)),
    ((2, 3, 9, 9), (3, 3), (4, 4), (1, 1)),
]


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "taps", "stride", "padding"), SHAPES)
def test_outputs_and_gradients(
    shape: tuple[int, ...], taps: Any, stride: Any, padding: Any, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    drawn = torch.randn(shape), torch.randn(7, shape[1], *taps)
    given = [x.to(dtype).contiguous(memory_format=layout).requires_grad_() for x in drawn]
    exact = [x.detach().double().requires_grad_() for x in given]
    output, expected = conv_product(*given, stride, padding), F.conv2d(*exact, None, stride, padding)
    rounding = torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert relative(output, expected) < rounding
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, given, grad)
    for got, wanted in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < rounding


def test_gradients_of_gradients_and_of_one_alone() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 4, 4).double().requires_grad_(), torch.randn(5, 3, 3, 3).double().requires_grad_()]
    found = [
        torch.autograd.grad(
            torch.autograd.grad(convolve(*given).tanh().sum(), given, create_graph=True)[0].square().sum(), given
        )
        for convolve in (lambda x, w: conv_product(x, w, (1, 1), (1, 1)), lambda x, w: F.conv2d(x, w, padding=1))
    ]
    torch.testing.assert_close(*found)
    alone = given[0].detach(), given[1]
    conv_product(*alone, (1, 1), (1, 1)).sum().backward()
    assert alone[0].grad is None
    assert alone[1].grad is not None


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.Size]]:
    """Dtypes and shapes of the filters of what became products."""
    if not _native.loaded:
        pytest.skip(_native.reason)
    found = []

    def counted(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        assert input.dtype == weight.dtype
        found.append((weight.dtype, weight.shape))
        return conv_product(input, weight, *rest)

    monkeypatch.setattr(convolutions, "conv_product", counted)
    return found


def test_which_become_products(taken: list[tuple[torch.dtype, torch.Size]]) -> None:
    torch.manual_seed(0)
    last = torch.channels_last
    x, w, b = torch.randn(16, 32, 8, 8), torch.randn(512, 32, 3, 3) / 17, torch.randn(512)
    x, w = x.contiguous(memory_format=last), w.contiguous(memory_format=last)

    def all_of_them() -> list[Tensor]:
        small = F.conv2d(x, w, b, 2, 1), F.conv2d(x, w[:, :, 1:2, 1:2], stride=(2, 2)), F.conv2d(x[..., :4, :4], w, b)
        others = F.conv2d(x, w, b, 1, 1), F.conv2d(x, w[:511], stride=2), F.conv2d(x, w, b, 2, 1, 2)
        others += (F.conv2d(x.contiguous(), w.contiguous(), b, 2, 1),)
        return [*small, *others, F.conv2d(x, w, b, padding="same"), F.conv2d(x, w[:, :16], None, 2, 1, groups=2)]

    for mixed in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            expected = all_of_them()
            with fast_convolutions():
                found = all_of_them()
        dtype = torch.bfloat16 if mixed else torch.float32
        assert taken == [(dtype, w.shape), (dtype, torch.Size([512, 32, 1, 1])), (dtype, w.shape)]
        bound = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps  # both have rounded their sums
        assert all(relative(a, b.double()) < bound for a, b in zip(found, expected, strict=True))
        assert all((a.dtype, a.stride()) == (b.dtype, b.stride()) for a, b in zip(found, expected, strict=True))
        assert not any(a._is_view() for a in found)
        taken.clear()


def test_errors_are_pytorchs(taken: list[tuple[torch.dtype, torch.Size]]) -> None:
    x, w = torch.randn(2, 32, 4, 4), torch.randn(512, 32, 3, 3)
    large = torch.zeros(512, 32, 7, 7)
    wrong: list[dict[str, Any]] = [{"stride": 0}, {"stride": -1}, {"padding": -1}, {"weight": large}]
    for arguments in [*wrong, {"bias": torch.zeros(1)}]:
        messages = []
        for way in (fast_convolutions, lambda: torch.no_grad()):
            with way(), pytest.raises(RuntimeError) as error:
                F.conv2d(**{"input": x, "weight": w, **arguments})
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert not taken
