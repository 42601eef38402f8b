"""Data, models and names in the forms in which people have them; errors that say what was expected and what came."""

import itertools
from collections import OrderedDict, UserDict, namedtuple
from enum import Enum

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fdcr_fast import ParamLayout, diagonal_fisher, diagonal_fisher_stacked
from tests.support.fisher.one_by_one import fisher_one_by_one

N = 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data():
    return torch.randn(N, 4), torch.randint(0, 3, (N,))


class Samples(Dataset):
    """As torchvision's: a sample is (input, int)."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class Rows(Samples):
    """As Hugging Face's data sets with format torch: a row is a mapping, and the class is none of PyTorch's."""

    def __getitem__(self, i):
        return {"input": self.x[i], "labels": self.y[i]}


class HuggingFace:
    def __init__(self, x, y):
        self.rows = Rows(x, y)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def set_format(self):
        raise AssertionError


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y, strict=True)


FORMS = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "NumPy": lambda x, y: (x.numpy(), y.numpy()),
    "NumPy, read-only": lambda x, y: (np.frombuffer(x.numpy().tobytes(), np.float32).reshape(N, 4), y.numpy()),
    "NumPy, int32, backwards": lambda x, y: (x.flip(0).numpy()[::-1], y.numpy().astype(np.int32)),
    "labels as a list": lambda x, y: (x, y.tolist()),
    "labels as a column": lambda x, y: (x, y[:, None]),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "loader of numbers": lambda x, y: DataLoader(Samples(x, y), batch_size=2),
    "data set": lambda x, y: TensorDataset(x, y),
    "data set of numbers": Samples,
    "data set of mappings": Rows,
    "Hugging Face": HuggingFace,
    "stream": Stream,
    "batches": lambda x, y: [(x[:5], y[:5]), (x[:0], y[:0]), (x[5:], y[5:])],
    "generator": lambda x, y: ((xi, yi) for xi, yi in zip(x.split(2), y.split(2), strict=True)),
    "batches of NumPy": lambda x, y: [(x[:5].numpy(), y[:5].numpy()), (x[5:].numpy(), y[5:].tolist())],
    "requires gradients": lambda x, y: (x.clone().requires_grad_(), y),
    "with gradients": lambda x, y: (x.clone().requires_grad_() * 1, y),
    "expanded": lambda x, y: (x, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form):
    class Named(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    model = Named(*network())
    x, y = data()
    expected = fisher_one_by_one(model, x, y)
    for batch_size in (None, 2):
        fisher = diagonal_fisher(model, FORMS[form](x, y), batch_size=batch_size)
        assert (fisher - expected).norm() < 1e-5 * expected.norm()


class Mode(Enum):
    PLAIN = 1


class Flagged(nn.Module):
    """Arguments as Hugging Face's models have them, most of which are no tensors."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(
        self,
        input_ids,
        mask=None,
        use_cache=True,
        scale=1.0,
        mode=None,
        name="",
        temperature=None,
        past=None,
        dtype=None,
    ):
        assert use_cache is False
        assert mode is Mode.PLAIN
        assert name == "name"
        assert dtype is torch.float32
        assert past is None or (past[0] is None and past[1].length == 2)
        h = self.embed(input_ids)
        h = h if mask is None else h * mask[..., None]
        return self.head(torch.tanh(h.sum(1))) * scale / (1 if temperature is None else temperature)


Past = namedtuple("Past", "length keys")


@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("with_mask", [True, False])
def test_arguments_that_are_no_tensors(with_mask, batch_size):
    model = Flagged()
    x, y = torch.randint(0, 9, (N, 5)), torch.randint(0, 3, (N,))
    mask = torch.rand(N, 5).round() if with_mask else None
    inputs = {
        "input_ids": x,
        "mask": mask,
        "use_cache": False,
        "scale": 2.0,
        "mode": Mode.PLAIN,
        "name": "name",
        "temperature": torch.tensor(0.5),
        "past": (None, Past(2, torch.randn(N, 2))),
        "dtype": torch.float32,
    }

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, mask):
            given = {"input_ids": x, "mask": mask if with_mask else None, "temperature": 0.5}
            return self.inner(**{**inputs, **given})

    expected = fisher_one_by_one(One(), (x, torch.ones(N, 5) if mask is None else mask), y)
    for form in (inputs, UserDict(inputs), OrderedDict(inputs)):
        for pair in ((form, y), [(form, y)], {**form, "labels": y}):
            fisher = diagonal_fisher(model, pair, batch_size=batch_size)
            assert (fisher - expected).norm() < 1e-5 * expected.norm()


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled in parallel": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "parallel, compiled": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_models(wrap):
    """By the names of the wrapped module and of the wrapper, and with states of either."""
    model, other = network(), network()
    x, y = data()
    wrapped = WRAPPED[wrap](model)
    expected = diagonal_fisher(model, (x, y))
    torch.testing.assert_close(diagonal_fisher(wrapped, (x, y)), expected)
    of_other = diagonal_fisher(other, (x, y))
    for state in (other.state_dict(), WRAPPED[wrap](other).state_dict(), nn.DataParallel(other).state_dict()):
        torch.testing.assert_close(diagonal_fisher(wrapped, (x, y), state=state), of_other)
        torch.testing.assert_close(diagonal_fisher(model, (x, y), state=state), of_other)
    bias = ParamLayout.from_module(model).unflatten(expected)["2.bias"]
    for name in ("2.bias", "module.2.bias", "_orig_mod.2.bias", "module._orig_mod.2.bias"):
        torch.testing.assert_close(diagonal_fisher(wrapped, (x, y), params=name), bias)


def test_a_layer_that_is_compiled():
    model = network()
    x, y = data()
    expected = diagonal_fisher(model, (x, y))
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    model[0] = torch.compile(model[0], backend="eager")
    assert "0._orig_mod.weight" in model.state_dict()
    for state in (None, plain, model.state_dict()):
        torch.testing.assert_close(diagonal_fisher(model, (x, y), state=state), expected)
    weight = diagonal_fisher(model, (x, y), params=["0.weight"])
    torch.testing.assert_close(weight, diagonal_fisher(model, (x, y), params=["0._orig_mod.weight"]))


def test_a_module_called_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

        def forward(self, x):
            return self.module(x)

    x, y = data()
    model = Outer()
    expected = fisher_one_by_one(model, x, y)
    for state in (None, model.state_dict(), model.module.state_dict(), nn.DataParallel(model).state_dict()):
        assert (diagonal_fisher(model, (x, y), state=state) - expected).norm() < 1e-5 * expected.norm()


def test_states_of_arrays():
    model, other = network(), network()
    x, y = data()
    state = {name: p.numpy() for name, p in other.state_dict().items()}
    torch.testing.assert_close(diagonal_fisher(model, (x, y), state=state), diagonal_fisher(other, (x, y)))


class Quantised(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.q = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)

    def forward(self, x):
        return self.a(x) * self.q.abs()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_parameters_that_are_not_real_numbers(dtype):
    model = Quantised(dtype)
    x, y = data()
    with pytest.raises(
        ValueError, match=r"no Fisher of parameters that are not real numbers, q \(torch.*: name the others"
    ):
        diagonal_fisher(model, (x, y))
    fisher = diagonal_fisher(model, (x, y), params=["a.weight", "a.bias"])
    torch.testing.assert_close(fisher, diagonal_fisher(model.a, (x, y)))


@pytest.mark.parametrize("where", ["data", "model", "state", "everything"])
def test_tensors_made_in_inference_mode(where):
    expected_model = network()
    x, y = data()
    expected = diagonal_fisher(expected_model, (x, y))
    with torch.inference_mode():
        inference = {name: p.clone() for name, p in expected_model.state_dict().items()}
        data_there = x.clone(), y.clone()
        model_there = network()
        model_there.load_state_dict(inference)
        assert all(p.is_inference() for p in model_there.parameters())
        if where == "everything":
            torch.testing.assert_close(diagonal_fisher(model_there, data_there, state=inference), expected)
    if where == "data":
        torch.testing.assert_close(diagonal_fisher(expected_model, data_there), expected)
    if where == "model":
        torch.testing.assert_close(diagonal_fisher(model_there, (x, y)), expected)
    if where == "state":
        torch.testing.assert_close(diagonal_fisher(network(), (x, y), state=inference), expected)
        stacked = {name: torch.stack([p, p]) for name, p in inference.items()}
        for row in diagonal_fisher_stacked(network(), stacked, [(x, y), data_there]):
            torch.testing.assert_close(row, expected)


class Padded(nn.Module):
    """Takes nn.TransformerEncoder's fast path over nested tensors where all its parameters are frozen."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x, padding):
        h = self.encoder(x, src_key_padding_mask=padding)
        return self.head(h.masked_fill(padding[..., None], 0).sum(1))


@pytest.mark.parametrize("params", [None, ["head.weight", "head.bias"]])
def test_encoders_with_padding(params):
    model = Padded().eval()
    x, y = torch.randn(8, 8, 4), torch.randint(0, 3, (8,))
    padding = torch.ones(8, 8, dtype=torch.bool).triu(1)
    layout = ParamLayout.from_module(model)
    whole = layout.unflatten(fisher_one_by_one(model, (x, padding), y))
    expected = torch.cat([whole[name].flatten() for name in params or layout.names])
    fast = torch.backends.mha.get_fastpath_enabled()
    fisher = diagonal_fisher(model, ((x, padding), y), params=params)
    assert (fisher - expected).norm() < 1e-5 * expected.norm()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def fisher(loss="cross_entropy", **options):
    return lambda model, data: diagonal_fisher(model, data, loss, **options)


X, Y = torch.randn(N, 4), torch.randint(0, 3, (N,))
BAD = [
    ((X, Y), fisher(Y), ValueError, "loss must be a name or a callable, got Tensor; data is one argument"),
    ((X, Y), fisher(params=["3.bias"]), ValueError, "no parameter 3.bias; it has 0.weight"),
    ((X, Y), fisher(check="sometimes"), ValueError, "unknown check 'sometimes': expected one of first, all, off"),
    ((X, Y), fisher(state={"0.bias": [1.0]}), TypeError, "expected a torch.Tensor or numpy.ndarray, got list"),
    (X, fisher(), ValueError, r"expected \(inputs, targets\), or an iterable of such batches, got Tensor"),
    (X.numpy(), fisher(), ValueError, "or an iterable of such batches, got ndarray"),
    (5, fisher(), ValueError, "or an iterable of such batches, got int"),
    ([(X, X, Y)], fisher(), ValueError, r"got tuple of 3; several inputs are a tuple: \(\(first, second\), targets\)"),
    ({"x": X, "y": Y}, fisher(), ValueError, "or mappings with labels, got dict of 2"),
    ((X, Y[:5]), fisher(), ValueError, r"the samples in dimension 0, got \[9\] inputs, \[5\] targets"),
    (((X, X[:3]), Y), fisher(), ValueError, r"got \[9, 3\] inputs, \[9\] targets"),
    ([(X[0], Y[0])], fisher(), ValueError, "got none: a batch, not a single sample"),
    ([((X, object()), Y)], fisher(), ValueError, "expected inputs of tensors, arrays, .*, got object"),
]


@pytest.mark.parametrize(("data", "call", "error", "message"), BAD)
def test_errors_of_data_and_arguments(data, call, error, message):
    with pytest.raises(error, match=message):
        call(network(), data)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: "model", TypeError, "expected a torch.nn.Module, got str"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            ValueError,
            "0.weight is not initialised: call the model once",
        ),
        (lambda: nn.Linear(4, 3, device="meta"), ValueError, "weight has no values: it is on the meta device"),
        (lambda: torch.jit.script(network()), TypeError, "the model is a ScriptModule"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 3))),
            TypeError,
            "1 is a ScriptModule, .*: pass the torch.nn.Module that it was made from",
        ),
    ],
)
def test_errors_of_models(model, error, message):
    with pytest.raises(error, match=message):
        diagonal_fisher(model(), (X, Y))


def test_loaders_without_an_end():
    model, (x, y) = network(), data()
    expected = fisher_one_by_one(model, x, y)
    endless = ((x, y) for _ in itertools.count())
    assert (diagonal_fisher(model, endless, max_batches=3) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(diagonal_fisher(model, [(x, y), (x * 2, y)], max_batches=1), diagonal_fisher(model, (x, y)))
    with pytest.raises(ValueError, match="max_batches must be positive, got 0"):
        diagonal_fisher(model, (x, y), max_batches=0)


def test_data_sets_leave_the_random_numbers_alone():
    model, (x, y) = network(), data()
    before = torch.get_rng_state()
    diagonal_fisher(model, TensorDataset(x, y))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse .torch.sparse_coo."),
        (lambda x: x.to_sparse_csr(), "sparse .torch.sparse_csr."),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
def test_tensors_that_are_not_dense(make, kind):
    x, y = data()
    with pytest.raises(
        ValueError, match=f"expected dense inputs, whose samples can be taken apart, got a {kind} tensor"
    ):
        diagonal_fisher(network(), (make(x), y))


def test_targets_with_flags():
    x, y = data()

    def loss(output, targets):
        smooth, labels = targets
        return nn.functional.cross_entropy(output, labels, reduction="none", label_smoothing=0.1 * smooth)

    model = network()
    fisher = diagonal_fisher(model, (x, (True, y)), loss)
    assert torch.equal(fisher, diagonal_fisher(model, (x, y), loss_options={"label_smoothing": 0.1}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_state_of_another_dtype_is_taken_as_when_it_is_loaded(dtype):
    model, (x, y) = network(), data()
    state = {name: (value * 2).to(dtype) for name, value in model.state_dict().items()}
    fisher = diagonal_fisher(model, (x, y), state=state)
    model.load_state_dict(state)
    assert torch.equal(fisher, diagonal_fisher(model, (x, y)))
    state["0.bias"] = torch.zeros(6, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"torch.float32 for 0.bias of state, got torch.complex"):
        diagonal_fisher(model, (x, y), state=state)


def test_losses_that_are_no_real_numbers():
    with pytest.raises(ValueError, match=r"losses must be real numbers, got torch\.complex64"):
        diagonal_fisher(network(), data(), lambda output, targets: output.sum(1) * 1j)


class Scales(nn.Module):
    """Several passes through one layer, by a list of numbers that all samples share, which the model may use up."""

    def __init__(self, once=False, writes=False):
        super().__init__()
        self.first, self.last, self.once, self.writes = nn.Linear(5, 4), nn.Linear(4, 3), once, writes

    def forward(self, x, scales):
        if self.once:
            return self.last(torch.tanh(self.first(x * sum(scales))))
        hidden = sum(torch.tanh(self.first(x * scale)) for scale in scales)
        if self.writes:
            scales[0] += 1.0
        return self.last(hidden)


@pytest.mark.parametrize("options", [{}, {"once": True}, {"writes": True}], ids=["twice", "once", "written"])
@pytest.mark.parametrize("batch_size", [None, 8, 4, 2])
def test_a_list_that_all_samples_share_is_shared_in_batches_of_its_length(options, batch_size):
    model, x, y = Scales(**options).double(), torch.randn(10, 5).double(), torch.randint(3, (10,))
    for check in ("off", "all"):
        scales = [1.0, 0.5]
        fisher = diagonal_fisher(model, ((x, scales), y), batch_size=batch_size, check=check)
        torch.testing.assert_close(fisher, fisher_one_by_one(Bound(model), x, y))
        assert scales == [1.0, 0.5]


class Bound(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, [1.0, 0.5])
