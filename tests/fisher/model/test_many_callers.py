"""Fishers taken from several threads, from inside of contexts and callbacks, and of models that were seen before."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fdcr_fast import diagonal_fisher, diagonal_fisher_stacked
from fdcr_fast.fisher.model.snapshot import Snapshot
from tests.support.fisher.one_by_one import fisher_one_by_one

N = 8
SCALE = 1.0


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fdcr_fast.fisher.check._verdicts", {})


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n=N):
    return torch.randn(n, 4).double(), torch.randint(0, 3, (n,))


@pytest.fixture
def _threads_that_switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_threads_that_switch_often")
def test_clients_in_threads_with_one_model():
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 2, 8, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    model = model.double().train()
    states = [{name: torch.randn_like(x) for name, x in model.state_dict().items()} for _ in range(8)]
    clients = [data(3) for _ in states]
    parameters, fastpath = list(model.parameters()), torch.backends.mha.get_fastpath_enabled()
    expected = [diagonal_fisher(model, client, state=s) for client, s in zip(clients, states, strict=True)]
    barrier = threading.Barrier(8)

    def work(k):
        barrier.wait()
        return diagonal_fisher(model, clients[k], state=states[k])

    with ThreadPoolExecutor(8) as pool:
        fishers = list(pool.map(work, range(8)))
    torch.testing.assert_close(fishers, expected)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model.training
    assert all(m.training and "forward" not in vars(m) for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_attributes_are_never_gone_while_they_are_put_back():
    """Other threads look at the modules of a model before they wait for it."""

    class Attributes(dict):
        def clear(self):
            raise AssertionError

    attributes = Attributes(training=True, weight=1, bias=2)
    snapshot = Snapshot([attributes], ())
    attributes.update(forward=print, weight=3)
    snapshot.restore()
    assert list(attributes.items()) == [("training", True), ("weight", 1), ("bias", 2)]


def test_attributes_are_put_back_in_their_order():
    attributes = {"weight": 1, "bias": 2}
    snapshot = Snapshot([attributes], ())
    attributes["weight"] = attributes.pop("weight")
    snapshot.restore()
    assert list(attributes.items()) == [("weight", 1), ("bias", 2)]


@pytest.mark.usefixtures("_threads_that_switch_often")
def test_switches_of_the_process_are_put_back_by_the_last_thread():
    models = [nn.Sequential(nn.RNNCell(4, 3).double()) for _ in range(4)]
    attention = torch.backends.cuda.flash_sdp_enabled()
    for model in models:
        model.forward = lambda x, cell=model[0]: cell(x) * cell.weight_hh.exp().sum()
    with ThreadPoolExecutor(4) as pool:
        fishers = list(pool.map(lambda model: diagonal_fisher(model, data(), check="off"), models * 5))
    assert len(fishers) == 20
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._get_mkldnn_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == attention


def test_inside_of_cached_parametrisations():
    model, (x, y) = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))).double(), data()
    expected = fisher_one_by_one(model, x, y)
    with parametrize.cached():
        model(x)
        torch.testing.assert_close(diagonal_fisher(model, (x, y)), expected)
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_progress_that_ends_in_train_mode():
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double(), data()
    with torch.no_grad():
        model(x)
    expected = diagonal_fisher(model, (x, y))
    fisher = diagonal_fisher(model, (x, y), batch_size=3, progress=lambda done: model.train())
    torch.testing.assert_close(fisher, expected)


class Joins(nn.Module):
    """Samples that are joined if something says so."""

    joined = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("flag", torch.tensor(False))

    def joins(self):
        return self.joined or SCALE > 1 or bool(self.flag)

    def forward(self, x, joined=False):
        h = self.a(x)
        return self.b(torch.tanh(h + h.mean(0) if joined or self.joins() else h))


@pytest.mark.parametrize("how", ["class", "global", "method", "argument", "buffer", "hook of all modules", "function"])
def test_models_that_have_passed_and_are_changed(how, monkeypatch):
    model, (x, y) = Joins().double(), data()
    diagonal_fisher(model, {"x": x, "joined": False, "labels": y})
    handle = None
    if how == "class":
        monkeypatch.setattr(Joins, "joined", True)
    elif how == "global":
        monkeypatch.setitem(globals(), "SCALE", 2.0)
    elif how == "method":
        monkeypatch.setattr(Joins, "joins", lambda self: True)
    elif how == "buffer":
        model.flag.fill_(True)
    elif how == "function":
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda x, *args: linear(x + x.mean(0), *args))
    elif how == "hook of all modules":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, _, output: output + output.mean(0) if isinstance(m, nn.Linear) else output
        )
    try:
        expected = 0
        for xi, yi in zip(x.split(1), y.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(xi, how == "argument"), yi), list(model.parameters()))
            expected = expected + torch.cat([g.flatten() for g in grads]) ** 2 / N
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not those of plain autograd")
            fisher = diagonal_fisher(model, {"x": x, "joined": how == "argument", "labels": y})
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(fisher, expected)


@pytest.mark.parametrize("nothing", ["ignored", "nan"])
def test_a_sample_without_a_gradient_shows_nothing(nothing):
    def client(bad):
        x, y = data()
        if bad and nothing == "ignored":
            y[1:] = -100
        elif bad:
            x[1:] = torch.nan
        return x, y

    model = Joins().double()
    model.flag.fill_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagonal_fisher(model, client(True))
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        diagonal_fisher(model, [client(True), client(False)])


def test_a_model_that_differed_for_one_client_is_not_right_for_the_next():
    model, (x, y) = Joins().double(), data()
    model.flag.fill_(True)
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        diagonal_fisher(model, (x, y))
    x, y = x[:1].expand(N, 4), y[:1].expand(N)  # alike, so that the mean of the batch is every sample's
    with pytest.warns(UserWarning, match="not those of plain autograd"):
        diagonal_fisher(model, (x, y))


def test_stacked_clients_with_arrays_and_an_iterator_of_names():
    model, clients = network(), [data(), data(3)]
    states = {name: torch.stack([x, x * 2]) for name, x in model.state_dict().items()}
    expected = diagonal_fisher_stacked(model, states, clients, params=["0.bias", "2.weight"])
    arrays = {name: x.numpy() for name, x in states.items()}
    assert torch.equal(diagonal_fisher_stacked(model, arrays, clients, params=iter(["0.bias", "2.weight"])), expected)


def test_models_in_threads_that_share_a_part():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
    models = [nn.Sequential(part, nn.Linear(8, classes)).double() for classes in (3, 5)]
    x = torch.randn(12, 4).double()
    jobs = []
    for model, classes in zip(models, (3, 5), strict=True):
        y = torch.randint(classes, (12,))
        state = {name: value * 2 for name, value in model.state_dict().items()}
        jobs.append((model, (x, y), state, diagonal_fisher(model, (x, y), state=state)))
    before = [value.clone() for model in models for value in model.state_dict().values()]

    def repeated(job):
        model, data, state, expected = job
        return all(torch.equal(diagonal_fisher(model, data, state=state, check="off"), expected) for _ in range(40))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeated, jobs))
    after = [value for model in models for value in model.state_dict().values()]
    assert all(map(torch.equal, after, before))
    assert all(type(parameter) is nn.Parameter for parameter in part.parameters())
