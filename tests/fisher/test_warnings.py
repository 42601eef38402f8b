"""Warnings show the line that called the library, by whatever way it got from there to the warning."""

import inspect

import pytest
import torch
from torch import nn

from fdcr_fast import diagonal_fisher, diagonal_fisher_stacked


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fdcr_fast.fisher.check._verdicts", {})


class Centred(nn.Module):
    """Every sample's output depends on all samples of its batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class Squares(nn.Module):
    """As many tokens as classes; the parameter is one that only ``vmap`` can do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x):
        return x * self.weight.exp()


def alone(model, data):
    return diagonal_fisher(model, data), inspect.currentframe().f_lineno


def stacked(model, data):
    state = {name: p.detach()[None] for name, p in model.named_parameters()}
    return diagonal_fisher_stacked(model, state, [data]), inspect.currentframe().f_lineno


@pytest.mark.parametrize("call", [alone, stacked])
@pytest.mark.parametrize(
    ("model", "shape", "labels", "message"),
    [
        (Centred, (4,), (), "not those of plain autograd"),
        (Squares, (5, 5), (5,), "do not tell which dimension holds the classes"),
    ],
)
def test_warnings_show_the_callers_line(call, model, shape, labels, message):
    data = torch.randn(6, *shape), torch.randint(0, 3, (6, *labels))
    with pytest.warns(UserWarning, match=message) as caught:
        _, line = call(model(), data)
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line)}
