"""One sample by plain autograd against the same sample by the fast way: what is found, and what is left alone."""

import copy
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import diagonal_fisher, diagonal_fisher_stacked
from fdcr_fast.fisher.check import Check
from fdcr_fast.fisher.estimate import Estimate
from fdcr_fast.fisher.graph.autograd import Graph
from fdcr_fast.fisher.graph.provenance import Axis
from fdcr_fast.fisher.layers import RULES
from fdcr_fast.fisher.model.settings import settings_of
from fdcr_fast.fisher.per_sample import PerSampleGradients
from tests.support.fisher.one_by_one import fisher_one_by_one

N = 7


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fdcr_fast.fisher.check._verdicts", {})


class Scaled(nn.Module):
    """A parameter that only the fallback can do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return x * self.weight.exp()


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), Scaled(), nn.Linear(6, 3))


def data(n=N):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def wrong_rule(patch):
    """Half of a layer's gradients."""
    original = Estimate._add_part

    def add_part(self, parts, rows, weight, last, added, name, grad):
        original(self, parts, rows, weight, last, added, name, grad / 2 if name == "2" else grad)

    patch.setattr(Estimate, "_add_part", add_part)


def layer_forgotten(patch):
    """As where a layer's gradient does not arrive where it was recorded."""
    original = Estimate._add_part

    def add_part(self, parts, rows, weight, last, added, name, grad):
        original(self, parts, rows, weight, last, added, name, grad * 0 if name == "0" else grad)

    patch.setattr(Estimate, "_add_part", add_part)


def squared_twice(patch):
    """As where a gradient is squared in place that belongs to another one."""
    original = PerSampleGradients._vectorised_gradients

    def gradients(self, *args):
        grads = original(self, *args)
        return grads and {name: g.square() for name, g in grads.items()}

    patch.setattr(PerSampleGradients, "_vectorised_gradients", gradients)


FAULTS = {wrong_rule: "2.bias, 2.weight", layer_forgotten: "0.bias, 0.weight", squared_twice: "3.weight"}


@pytest.mark.parametrize("check", ["first", "all"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found_and_avoided(fault, check, monkeypatch):
    fault(monkeypatch)
    model, (x, y) = network(), data()
    expected = fisher_one_by_one(model, x, y)
    with pytest.warns(UserWarning, match=f"gradients of {FAULTS[fault]} are not those of plain autograd: .*slow"):
        fisher = diagonal_fisher(model, (x, y), batch_size=3, check=check)
    assert (fisher - expected).norm() < 1e-5 * expected.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unchecked = diagonal_fisher(model, (x, y), check="off")
    assert (unchecked - expected).norm() > 1e-3 * expected.norm()


def test_rows_that_are_not_samples(monkeypatch):
    """As where rows are taken for samples because there are as many."""

    class Tokens(nn.Module):
        """The layer's rows are the two tokens of some samples."""

        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(2, 6), nn.Linear(6, 3)

        def forward(self, x):
            chosen = (x[:, 0] > 0)[:, None].expand(-1, 2)
            h = self.a(x.view(-1, 2, 2)[chosen])
            h = torch.zeros(len(x), 2, 6).index_put(chosen.nonzero(as_tuple=True), h)
            return self.head(torch.tanh(h).sum(1))

    monkeypatch.setattr(Graph, "axes", lambda self, edges: dict.fromkeys(edges, Axis(0)))
    model, (x, y) = Tokens(), data(4)
    x[:, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    whole, one = diagonal_fisher(model, (x, y), check="off"), diagonal_fisher(model, (x, y), check="off", batch_size=1)
    assert (whole - one).norm() > 1e-2 * one.norm()
    with pytest.warns(UserWarning, match=r"gradients of a.bias, a.weight are not those"):
        torch.testing.assert_close(diagonal_fisher(model, (x, y)), one)


def test_faults_that_begin_later(monkeypatch):
    original = Estimate._add_part
    calls = []

    def add_part(self, parts, rows, weight, last, added, name, grad):
        calls.append(name)
        original(self, parts, rows, weight, last, added, name, grad * 2 if len(calls) > 12 else grad)

    monkeypatch.setattr(Estimate, "_add_part", add_part)
    with pytest.raises(RuntimeError, match=r"not those of plain autograd after the first 6 samples.*batch_size=1"):
        diagonal_fisher(network(), data(), batch_size=3, check="all")


def compared(monkeypatch):
    """The sizes of the batches that are compared."""
    sizes = []
    original = Check._differing

    def differing(self, batch):
        sizes.append(batch.samples)
        return original(self, batch)

    monkeypatch.setattr(Check, "_differing", differing)
    return sizes


def test_what_is_checked(monkeypatch):
    sizes = compared(monkeypatch)
    model, (x, y) = network(), data()
    diagonal_fisher(model, (x, y), batch_size=3, check="off")
    assert sizes == []
    diagonal_fisher(model, (x, y), batch_size=3)
    diagonal_fisher(model, (x, y), batch_size=4)  # alike
    diagonal_fisher(model, (x, y), state=network().state_dict())
    diagonal_fisher(network(), (x, y))
    assert sizes == [3]
    diagonal_fisher(model, (x, y), batch_size=3, check="all")
    assert sizes == [3, 3, 3, 1]
    sizes.clear()
    model[2] = nn.Linear(6, 6, bias=False)
    diagonal_fisher(model, (x, y))
    diagonal_fisher(model, (x, y), params=["2.weight"])
    diagonal_fisher(model, (x, y), kind="exact")
    model[2].register_forward_hook(lambda *args: None)
    diagonal_fisher(model, (x, y))
    model[2].forward = lambda x: nn.Linear.forward(model[2], x)
    diagonal_fisher(model, (x, y))
    diagonal_fisher(model.double(), (x.double(), y))
    assert sizes == [N] * 6
    diagonal_fisher(model, (x.double(), y), kind="squared_batch_gradient", check="all")
    assert sizes == [N] * 6


def test_many_clients_are_checked_once(monkeypatch):
    sizes = compared(monkeypatch)
    model = network()
    states = {name: torch.stack([p, p * 2, p * 3]) for name, p in model.state_dict().items()}
    diagonal_fisher_stacked(model, states, [data(), data(3), data(5)])
    assert sizes == [N]


@pytest.mark.parametrize("kind", ["empirical", "exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nothing_is_found_where_nothing_is(kind, dtype):
    model, (x, y) = network().to(dtype), data(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            diagonal_fisher(model, (x.to(dtype), y), batch_size=4, kind=kind, check="all")


def test_nothing_is_found_under_autocast():
    model, (x, y) = network(), data(40)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        diagonal_fisher(model, (x, y), batch_size=4, check="all")


def test_random_numbers_are_those_without_a_check():
    model, (x, y) = network(), data()

    def draw(check):
        generator = torch.Generator().manual_seed(3)
        fisher = diagonal_fisher(model, (x, y), kind="sampled", num_samples=3, generator=generator, check=check)
        return fisher, generator.get_state()

    torch.testing.assert_close(draw("off"), draw("all"), rtol=0, atol=0)
    state = torch.get_rng_state()
    fishers = []
    for check in ("off", "all"):
        torch.set_rng_state(state)
        fishers.append((diagonal_fisher(model, (x, y), kind="sampled", check=check), torch.get_rng_state()))
    torch.testing.assert_close(*fishers, rtol=0, atol=0)


def test_models_that_draw_random_numbers_cannot_be_checked(caplog):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    caplog.set_level("INFO", logger="fdcr_fast")
    dropout = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (Noisy(4, 3), dropout):
            fishers = []
            for check in ("off", "all"):
                torch.manual_seed(1)
                fishers.append(diagonal_fisher(model, data(), eval_mode=model is not dropout, check=check))
            assert torch.equal(*fishers)
    assert caplog.text.count("the forward pass draws random numbers") == 2


def test_models_that_do_not_take_single_samples():
    """That the check fails is not the user's problem."""

    class Seven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            assert len(x) == N
            return self.layer(x)

    model, (x, y) = Seven(), data()
    expected = fisher_one_by_one(model.layer, x, y)
    assert (diagonal_fisher(model, (x, y), check="all") - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(ValueError, match=r"one value per sample, \[7\], got \(\)"):
        diagonal_fisher(model, (x, y), lambda o, t: F.cross_entropy(o, t), check="all")


def test_samples_that_depend_on_each_other_are_noticed():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    model, (x, y) = Centred(), data()
    with pytest.warns(UserWarning, match="Does the model treat the samples of a batch independently"):
        diagonal_fisher(model, (x, y))


def test_diverged_models_are_left_alone():
    model, (x, y) = network(), data()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert diagonal_fisher(model, (x, y), check="all").isnan().any()


class Configured(nn.Module):
    """Takes another way by what a dictionary, a list or an object of its own says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.options, self.steps, self.config = {"centre": False}, [1], Options(centre=False)

    def forward(self, x):
        centre = self.options["centre"] or len(self.steps) > 1 or self.config.inner["centre"]
        return self.layer(x - x.mean(0) if centre else x)


class Options:
    def __init__(self, centre):
        self.inner = {"centre": centre}


@pytest.mark.parametrize("where", ["dictionary", "list", "object", "loss", "options of the loss", "closure"])
def test_what_has_passed_is_known_by_all_its_settings(where, monkeypatch):
    sizes = compared(monkeypatch)

    def centred(centre):
        def loss(output, targets):
            return F.cross_entropy(output - output.mean(0) if centre else output, targets, reduction="none")

        return loss

    model, (x, y) = Configured(), data()
    first = centred(False) if where == "closure" else "cross_entropy"
    for _ in range(2):
        diagonal_fisher(model, (x, y), first)
    assert sizes == [N]
    if where == "dictionary":
        model.options["centre"] = True
    elif where == "list":
        model.steps.append(2)
    elif where == "object":
        model.config.inner["centre"] = True
    second = centred(where == "closure") if where in ("closure", "loss") else "cross_entropy"
    options = {"label_smoothing": 0.1} if where == "options of the loss" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most of them join samples now
        diagonal_fisher(model, (x, y), second, loss_options=options)
    assert sizes == [N, N]


def test_models_made_alike_have_the_same_settings():
    def made():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        model(torch.randn(2, 1, 5, 5))
        model[2].register_forward_hook(print)
        model.options, model.again = {"a": [1, 2.0, {"b"}], 3: None}, [model]
        model.scale = partial(torch.mul, other=2)
        return model

    one, other = made(), made()
    assert settings_of(one) == settings_of(other) == settings_of(copy.deepcopy(one))
    assert hash(settings_of(one)) == hash(settings_of(other))
    for change in ("options", "scale", "hook", "dtype", "stride"):
        other = made()
        if change == "options":
            other.options["a"][2].add("c")
        elif change == "scale":
            other.scale = partial(torch.mul, other=3)
        elif change == "hook":
            other[2].register_forward_hook(print)
        elif change == "dtype":
            other.double()
        else:
            other[0].stride = (2, 2)
        assert settings_of(other) != settings_of(one)


def test_settings_of_what_is_odd():
    """Cycles, long data, objects without attributes, closures that are not filled yet."""

    def function():
        return late

    loop = [1]
    loop.append(loop)
    things = [function, loop, object(), iter([1]), {"x": range(9)}, np.zeros(3), Options, print, [0] * 10**6, [].append]
    for thing in things:
        assert hash(settings_of(thing)) == hash(settings_of(thing))
        assert settings_of(thing) == settings_of(thing)
    late = 1


@pytest.mark.parametrize("n", [3, 40])
def test_samples_that_have_no_entry_in_common(n, monkeypatch):
    """The square of their sum is the sum of their squares."""
    model, (x, y) = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 3)), (torch.arange(n), torch.arange(n) % 3)
    monkeypatch.setitem(RULES, nn.Embedding, replace(RULES[nn.Embedding], sum_squares=square_of_the_sum))
    x[-1] = x[0]
    with pytest.warns(UserWarning, match=r"0\.weight are not those of plain autograd"):
        fisher = diagonal_fisher(model.double(), (x, y))
    torch.testing.assert_close(fisher, fisher_one_by_one(model, x, y))


def square_of_the_sum(module, input, grad_output):
    total = torch.zeros_like(module.weight)
    return {"weight": total.index_add(0, input.flatten(), grad_output.reshape(-1, total.shape[1])).square()}


def test_what_is_saved_for_the_backward_pass_may_be_changed():
    model, (x, y) = network().double(), data()
    x = x.double()
    expected = diagonal_fisher(model, (x, y))
    rounded = torch.autograd.graph.saved_tensors_hooks(lambda s: s.round() if s.is_floating_point() else s, lambda s: s)
    with rounded, pytest.warns(UserWarning, match="not those of plain autograd"):
        diagonal_fisher(model, (x, y))
    torch.testing.assert_close(diagonal_fisher(model, (x, y)), expected)


@pytest.mark.parametrize("kind", [range, slice])
def test_ranges_and_slices_are_settings(kind):
    assert settings_of([kind(0, 4)]) == settings_of([kind(0, 4)]) != settings_of([kind(4, 8)])
