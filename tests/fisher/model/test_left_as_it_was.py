"""Models and data are after a call what they were before, whatever forward passes do to them."""

import copy
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdcr_fast import ParamLayout, diagonal_fisher, diagonal_fisher_stacked

N = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Base(nn.Module):
    """Two layers with rules around a parameter without one."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.head = nn.Linear(3, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)) * self.scale)


class WritesToItsInput(Base):
    def forward(self, x):
        return super().forward(x.sub_(1.0).div_(0.5))


class CountsAndAverages(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return super().forward(x)


class NormalisesByItsAverage(CountsAndAverages):
    """What one sample writes, the others read: alone, every sample has another mean."""

    def forward(self, x):
        output = super().forward(x)
        return output + self.mean.sum() * self.scale[:3]


class ExchangesItsBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        return super().forward(x - self.mean)


class WritesByData(Base):
    """As old code does; autograd does not count this as a version."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x):
        output = super().forward(x + self.offset)
        self.offset.data.add_(1)
        return output


class ClipsItsWeights(Base):
    def forward(self, x):
        with torch.no_grad():
            self.scale.clamp_(max=0.5)
        return super().forward(x)


class ClipsItsWeightsByData(Base):
    def forward(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class StoresTensors(Base):
    def __init__(self):
        super().__init__()
        self.last, self.all, self.by_name, self.seen, self.queue = None, [], {"n": 0}, set(), deque(maxlen=2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        self.last = h
        self.new = h * 2
        self.all.append(h)
        self.by_name["h"] = h
        self.seen.add(h)
        self.queue.append(h)
        self.head.remembered = h
        return self.head(h * self.scale)


class StoresInPlace(Base):
    """A plain tensor on the module."""

    def __init__(self):
        super().__init__()
        self.memory, self.memories = torch.zeros(3), [torch.zeros(3)]

    def forward(self, x):
        with torch.no_grad():
            self.memory.add_(1)
            self.memories[0].mul_(2).add_(1)
        return super().forward(x + 0 * self.memory)


class RemembersItsState(Base):
    """As a recurrent network in a stream: every call is to begin with the state that it has now."""

    def __init__(self):
        super().__init__()
        self.state = torch.zeros(5)

    def forward(self, x):
        h = torch.tanh(self.a(x) + self.state)
        self.state = h.detach().mean(0)
        return self.head(h * self.scale)


class RegistersHooks(Base):
    def forward(self, x):
        output = super().forward(x)
        self.a.register_forward_hook(lambda module, args, output: output * 2)
        return output


class Shortens(nn.Module):
    """Embeddings with max_norm shorten their rows in place; the head shares the rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 4, max_norm=0.5), nn.Linear(4, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed((x > 0).long()).sum(1).tanh())


class SwitchesModes(Base):
    def forward(self, x):
        self.a.train()
        output = super().forward(x)
        self.head.train()
        return output


MODELS = [
    Base,
    WritesToItsInput,
    CountsAndAverages,
    NormalisesByItsAverage,
    ExchangesItsBuffer,
    WritesByData,
    ClipsItsWeights,
    ClipsItsWeightsByData,
    StoresTensors,
    StoresInPlace,
    RemembersItsState,
    RegistersHooks,
    Shortens,
    SwitchesModes,
]


def by_copies(model, x, y):
    """The definition: every sample by a copy of the model of its own."""
    total = 0
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        one = copy.deepcopy(model)
        loss = F.cross_entropy(one(xi.clone()), yi)
        grads = torch.autograd.grad(loss, list(one.parameters()), materialize_grads=True)
        total = total + torch.cat([g.flatten() for g in grads]) ** 2
    return total / len(x)


def contents(model):
    """Everything in and on the modules, tensors by identity and by value."""
    found = []
    for module in model.modules():
        for name, value in vars(module).items():
            entries = (
                list(value.items())
                if isinstance(value, dict)
                else list(value)
                if isinstance(value, list | deque)
                else value
            )
            found.append((name, repr(entries) if isinstance(value, set) else entries))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return found, {name: (id(x), x.clone(), x.requires_grad, x.grad) for name, x in tensors.items()}


def assert_same(now, before):
    assert str(now[0]) == str(before[0])
    for name, (address, value, requires_grad, grad) in before[1].items():
        assert now[1][name][0] == address, name
        assert torch.equal(now[1][name][1], value), name
        assert now[1][name][2:] == (requires_grad, grad), name


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 3}, {"check": "off"}, {"check": "all"}])
@pytest.mark.parametrize("model_type", MODELS)
def test_models(model_type, options):
    model = model_type().double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(0, 3, (N,))
    given, before = (x.clone(), y.clone()), contents(model)
    expected = by_copies(model, x, y)
    for _ in range(2):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), **options), expected, rtol=1e-9, atol=1e-20)
        assert_same(contents(model), before)
        assert torch.equal(x, given[0])
        assert torch.equal(y, given[1])
    again = copy.deepcopy(model)  # fails where a dead tensor of a transformation is left
    assert torch.equal(again(x.clone()), copy.deepcopy(model)(x.clone()))


@pytest.mark.parametrize("model_type", MODELS)
def test_given_states(model_type):
    """Neither the model nor the states change, also those that are one memory."""
    model = model_type().double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(0, 3, (N,))
    clients = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        for client in clients:
            for p in client.parameters():
                p.add_(0.2 * torch.randn_like(p))
    tensors = [{**dict(c.named_parameters()), **dict(c.named_buffers())} for c in clients]
    states = {name: torch.stack([t[name].detach() for t in tensors]) for name in tensors[0]}
    kept, before = {name: x.clone() for name, x in states.items()}, contents(model)
    rows = diagonal_fisher_stacked(model, states, [(x, y), (x, y)])
    for client, row in zip(clients, rows, strict=True):
        torch.testing.assert_close(row, by_copies(client, x, y), rtol=1e-9, atol=1e-20)
    assert_same(contents(model), before)
    for name, value in states.items():
        assert torch.equal(value, kept[name]), name


def test_a_model_that_begins_to_write_to_its_parameters():
    """Nothing was copied, as nothing was written before: it says so, and the next call is right again."""

    class Sometimes(ClipsItsWeights):
        def forward(self, x):
            return super().forward(x) if x.max() > 9 else Base.forward(self, x)

    model = Sometimes().double()
    x, y = torch.randn(N, 3).double(), torch.randint(0, 3, (N,))
    diagonal_fisher(model, (x, y), check="off")
    x[:, 0] = 10
    with pytest.raises(ValueError, match="the forward pass has written to scale, and never before: call again"):
        diagonal_fisher(model, (x, y), check="off")
    nn.init.uniform_(model.scale)
    before = model.scale.clone()
    fisher = diagonal_fisher(model, (x, y), check="off")
    assert torch.equal(model.scale, before)
    torch.testing.assert_close(fisher, by_copies(model, x, y))


@pytest.mark.parametrize("writer", [ClipsItsWeights, ClipsItsWeightsByData])
def test_other_settings_with_which_a_model_writes_to_its_parameters(writer):
    class Switched(writer):
        clips = False

        def forward(self, x):
            return super().forward(x) if self.clips else Base.forward(self, x)

    model = Switched().double()
    x, y = torch.randn(N, 3).double(), torch.randint(0, 3, (N,))
    diagonal_fisher(model, (x, y), check="off")
    model.clips = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(diagonal_fisher(model, (x, y), check="off"), by_copies(model, x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss", ["cross_entropy", lambda o, t: F.cross_entropy(o, t.clamp_(max=1), reduction="none")])
def test_losses_that_write_to_targets(loss):
    model = Base()
    x, y = torch.randn(N, 3), torch.tensor([0, 1, 2, 2])
    first = diagonal_fisher(model, (x, y), loss)
    assert torch.equal(y, torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(diagonal_fisher(model, (x, y), loss), first)


def test_modules_under_two_names():
    """The copy under the second name must not keep the values of a client."""

    class Twice(Base):
        def __init__(self):
            super().__init__()
            self.again = self.a

    model = Twice().eval()
    x, y = torch.randn(N, 3), torch.randint(0, 3, (N,))
    client = {name: p + 0.3 for name, p in model.state_dict().items()}
    before = contents(model)
    diagonal_fisher(model, (x, y), state=client)
    assert_same(contents(model), before)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_renormalised_table_beside_a_parameter_of_some_samples():
    """A forward pass that writes to what its graph holds, and a graph asked for checkpoints that hide a parameter."""

    class Renormalises(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(9, 4, max_norm=0.5, mode="sum")
            self.weights, self.scale = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            rows = self.table(x, per_sample_weights=self.weights.expand(x.shape))
            return self.head(torch.tanh(rows * self.scale if x[0, 0] % 2 else rows))

    model = Renormalises().double().eval()
    x, y = torch.arange(5 * N).view(N, 5) % 9, torch.randint(0, 3, (N,))
    before = contents(model)
    fisher = diagonal_fisher(model, (x, y), batch_size=1)
    assert_same(contents(model), before)
    torch.testing.assert_close(fisher, by_copies(model, x, y))


def test_a_module_that_is_converted_in_its_forward_pass():
    class Converts(Base):
        def forward(self, x):
            self.a.to(torch.float64)
            return super().forward(x)

    model = Converts().double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(0, 3, (N,))
    torch.testing.assert_close(diagonal_fisher(model, (x, y)), by_copies(model, x, y))


def test_errors_leave_everything_as_it_was():
    class Fails(CountsAndAverages):
        def forward(self, x):
            super().forward(x.mul_(2))
            self.left = torch.zeros(1)
            if len(x) == N:
                raise RuntimeError("no more")
            return super().forward(x)

    model = Fails().train()
    x, y = torch.randn(N, 3), torch.randint(0, 3, (N,))
    given, before = x.clone(), contents(model)
    with pytest.raises(RuntimeError, match="no more"):
        diagonal_fisher(model, (x, y))
    assert_same(contents(model), before)
    assert torch.equal(x, given)
    assert not any(module._forward_hooks for module in model.modules())
    assert ParamLayout.from_module(model).numel == sum(p.numel() for p in model.parameters())


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.log = {"outputs": [], "counts": {"n": {"k": 0}}}
        self.pair = ([], {"calls": 0})

    def forward(self, x):
        output = self.layer(x) + self.log["counts"]["n"]["k"]
        self.log["outputs"].append(output)
        self.log["counts"]["n"]["k"] += 1
        self.pair[0].append(1)
        self.pair[1]["calls"] += 1
        return output.sin()


def test_containers_in_containers():
    model, x, y = Nested().double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = 0
    for i in range(6):
        output = model.layer(x[i : i + 1]).sin()
        grads = torch.autograd.grad(F.cross_entropy(output, y[i : i + 1]), list(model.parameters()))
        expected = expected + torch.cat([g.flatten() for g in grads]).square() / 6
    for batch_size in (None, 2):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), batch_size=batch_size), expected)
        assert model.log == {"outputs": [], "counts": {"n": {"k": 0}}}
        assert model.pair == ([], {"calls": 0})
    copy.deepcopy(model)
