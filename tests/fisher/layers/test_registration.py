"""Rules of a user's own layers: registered, called and right; or refused, where they would never be called."""

import functools
import warnings
from abc import ABC, abstractmethod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast import diagonal_fisher
from fdcr_fast.fisher.layers import RULES, rule, table
from fdcr_fast.fisher.layers.reachable import USUAL_PARAMS, why_never_called
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one


@pytest.fixture(autouse=True)
def _own_table():
    torch.manual_seed(0)
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def scales(module, input, grad_output):
    """The rule of all layers below, whatever they call their parameters."""
    per_sample = (grad_output * input).reshape(len(input), -1, input.shape[-1]).sum(1)
    shifts = grad_output.reshape(len(input), -1, input.shape[-1]).sum(1)
    squares = per_sample.square().sum(0)
    return {"weight": squares, "scale": squares, "gain": squares, "bias": shifts.square().sum(0)}


class Layer(nn.Module):
    """``x * scale``, by whatever name."""

    def forward(self, x):
        return torch.mul(*torch.broadcast_tensors(x, next(iter(self._parameters.values()))))


class Scale(Layer):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))


class ScaleAndShift(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.bias = nn.Parameter(torch.rand(4)) if bias else None

    def forward(self, x):
        return x * self.weight + (0 if self.bias is None else self.bias)


class Named(Layer):
    def __init__(self):
        super().__init__()
        self.register_parameter("scale", nn.Parameter(torch.rand(4)))


class Declared(Layer):
    """Its parameter is made by a function elsewhere."""

    scale: Tensor

    def __init__(self):
        super().__init__()
        add_scale(self)


def add_scale(module):
    module.scale = nn.Parameter(torch.rand(4))


class Inherited(Named):
    pass


class Returned(Layer):
    def __init__(self):
        super().__init__()
        self.gain = make_gain()


def make_gain():
    return nn.Parameter(torch.rand(4))


class Decorated(Layer):
    def __init__(self):
        super().__init__()
        self.make()

    @torch.no_grad()
    def make(self):
        assert not isinstance(self.training, nn.Parameter)
        self.count = 3
        self.inner = nn.Linear(4, 4)
        self.inner.extra = nn.Parameter(torch.rand(1))
        del self.inner
        self.scale = nn.Parameter(torch.rand(4))


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (Scale, {}),
        (ScaleAndShift, {}),
        (functools.partial(ScaleAndShift, bias=False), {}),
        (Named, {"params": ("scale",)}),
        (Named, {"params": "scale"}),
        (Declared, {"params": ["scale"]}),
        (Inherited, {"params": ("scale",)}),
        (Returned, {"params": ("gain",)}),
        (Decorated, {"params": ("scale",)}),
    ],
)
def test_rule_of_an_own_layer_is_called(monkeypatch, layer, options):
    calls = []

    @rule(getattr(layer, "func", layer), own_dims=lambda module: 1, **options)
    def counted(module, input, grad_output):
        calls.append(module)
        return scales(module, input, grad_output)

    model = nn.Sequential(nn.Linear(3, 4), layer(), nn.Flatten(), nn.Linear(20, 2)).double()
    x, y = torch.randn(6, 5, 3).double(), torch.randint(0, 2, (6,))
    monkeypatch.setattr(PerSampleGradients, "sum_squares", None)  # the rule alone
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check="off"), fisher_one_by_one(model, x, y))
    assert calls == [model[1]]


class Container(nn.Module):
    """Called by nobody: what it holds is."""


class Recurrent(nn.LSTM):
    pass


class Lazy(nn.LazyLinear):
    pass


class Base(nn.Module, ABC):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    @abstractmethod
    def forward(self, x): ...


class Function(nn.Module):
    def forward(self, x):
        return F.softplus(x)


class Wrapper(nn.Module):
    """Its parameters are those of the layer in it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return F.linear(x, self.linear.weight, self.linear.bias)


class ScaleAndGain(ScaleAndShift):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return super().forward(x) * self.gain


class AsProperty(Scale):
    @property
    def forward(self):
        return super().forward


class MadeAnew(Scale):
    def _forward(self, factor, x):
        return factor * super().forward(x)

    forward = functools.partialmethod(_forward, 2)


class Autograd(torch.autograd.Function):
    pass


NEVER_CALLED = {
    "parameters of other names": (Named, {}, r"no parameter weight or bias \(its code makes scale\): name all that it"),
    "an unknown name": (Scale, {"params": ("wieght",)}, r"no parameter wieght \(its code makes weight\)"),
    "a name too many": (Scale, {"params": ("weight", "gain")}, "no parameter gain"),
    "a name too few": (ScaleAndGain, {}, "also has the parameter gain"),
    "two names too few": (ScaleAndGain, {"params": "bias"}, "also has the parameter gain, weight"),
    "no name": (Scale, {"params": ()}, "also has the parameter weight"),
    "no parameters": (Function, {}, r"no parameter weight or bias \(its code makes none\)"),
    "no parameters, as said": (Function, {"params": ()}, "it has no parameters"),
    "parameters of another module": (Wrapper, {}, "no parameter weight or bias"),
    "a layer of PyTorch's": (nn.MultiheadAttention, {}, "its code makes bias_k, bias_v, in_proj_bias"),
    "no forward": (Container, {}, "it has no forward"),
    "a list": (nn.ParameterList, {}, "it has no forward"),
    "a property": (AsProperty, {}, "its forward is a property"),
    "made anew": (MadeAnew, {}, "its forward is a property, or made anew"),
    "abstract": (Base, {}, "it is abstract"),
    "recurrent": (Recurrent, {"params": ("weight_ih_l0",)}, "recurrent layers are taken apart"),
    "lazy": (Lazy, {}, "its modules become Linear"),
    "TorchScript": (torch.jit.ScriptModule, {}, "modules of TorchScript"),
    "batched= beside own_dims=": (Scale, {"own_dims": len, "batched": len}, "batched= would never be called"),
}


@pytest.mark.parametrize(("layer", "options", "message"), NEVER_CALLED.values(), ids=list(NEVER_CALLED))
def test_rule_that_would_never_be_called(layer, options, message):
    before = dict(RULES)
    with pytest.raises(ValueError, match=message):
        rule(layer, **options)(scales)
    assert before == RULES


@pytest.mark.parametrize("case", ["parameters of other names", "an unknown name", "a name too few", "made anew"])
def test_such_a_rule_was_silently_not_called(monkeypatch, case):
    """What the refusals are for: none of these is one too many."""
    layer, options, _ = NEVER_CALLED[case]
    monkeypatch.setattr(table, "why_never_called", lambda *_: None)
    rule(layer, own_dims=lambda module: 1, **options)(None)
    model = nn.Sequential(nn.Linear(3, 4), layer())
    x, y = torch.randn(6, 3), torch.randint(0, 4, (6,))
    torch.testing.assert_close(diagonal_fisher(model, (x, y)).double(), fisher_one_by_one(model, x, y))


def test_rule_that_forgets_a_parameter():
    rule(ScaleAndShift)(lambda *args: {"weight": scales(*args)["weight"]})
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    with pytest.raises(ValueError, match=r"the rule of ScaleAndShift gives weight, and no bias"):
        diagonal_fisher(ScaleAndShift(), (x, y), check="off")
    model = ScaleAndShift(bias=False).double()
    torch.testing.assert_close(diagonal_fisher(model, (x.double(), y)), fisher_one_by_one(model, x, y))


@pytest.mark.parametrize("base", [Scale, lambda: nn.Linear(4, 4)], ids=["own", "of PyTorch"])
def test_layer_that_changes_after_its_call(base):
    """Its rule would be given another layer than the one that was called; so it is not used."""

    class Times(type(base())):
        factor = None

        def forward(self, x):
            return super().forward(x) * self.factor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.times = Times(4, 4) if issubclass(Times, nn.Linear) else Times()

        def forward(self, x):
            self.times.factor = 2.0
            y = self.times(x)
            self.times.factor = 3.0
            return y

    @rule(Times)
    def times(module, input, grad_output):
        raise AssertionError

    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    model = Model().double()
    torch.testing.assert_close(diagonal_fisher(model, (x.double(), y), check="off"), fisher_one_by_one(model, x, y))


def test_second_rule_of_a_layer():
    rule(Scale)(scales)
    with pytest.raises(ValueError, match=r"Scale has a rule already, .*test_registration\.scales, and only one"):
        rule(ScaleAndShift, Scale)(lambda *_: {})
    assert ScaleAndShift not in RULES
    assert RULES.pop(Scale).sum_squares is scales
    rule(Scale)(scales)
    with pytest.raises(ValueError, match=r"Linear has a rule already, fdcr_fast\.fisher\.layers\.linear\.linear"):
        rule(nn.Linear)(scales)


@pytest.mark.parametrize("layer", [F.linear, Autograd, nn.Linear(2, 2), "Linear"])
def test_rule_of_something_else_than_a_class_of_modules(layer):
    with pytest.raises(TypeError, match=r"rules are for classes of torch\.nn\.Module"):
        rule(layer)


def test_rule_of_nothing():
    with pytest.raises(ValueError, match="needs the classes"):
        rule()
    with pytest.raises(ValueError, match="needs the classes"):
        rule(own_dims=lambda module: 1)


def of_the_sum(module, input, grad_output):
    """What is easily written: the square of the batch's gradient."""
    return {"weight": (grad_output * input).reshape(-1, input.shape[-1]).sum(0).square()}


def _fisher_of_scaled(n):
    model = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Linear(4, 2)).double()
    x, y = torch.randn(n, 3).double(), torch.randint(2, (n,))
    return diagonal_fisher(model, (x, y)), fisher_one_by_one(model, x, y)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_a_rule_that_adds_samples_before_it_squares_is_found(n):
    rule(Scale)(of_the_sum)
    with pytest.warns(UserWarning, match=r"1\.weight are not those of plain autograd"):
        torch.testing.assert_close(*_fisher_of_scaled(n))


def test_a_rule_is_checked_also_where_the_model_has_passed_without_it_or_with_another():
    torch.testing.assert_close(*_fisher_of_scaled(8))
    for each, found in ((scales, False), (of_the_sum, True), (scales, False)):
        RULES.pop(Scale, None)
        rule(Scale)(each)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.testing.assert_close(*_fisher_of_scaled(8))
        assert any("plain autograd" in str(warning.message) for warning in caught) == found


@pytest.mark.parametrize("layer", RULES, ids=lambda layer: layer.__name__)
def test_rules_of_pytorchs_own_layers_are_called(layer):
    own = RULES[layer].params
    assert why_never_called(layer, None if own == USUAL_PARAMS else own) is None
