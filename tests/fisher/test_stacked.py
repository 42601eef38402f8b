"""Fishers at given parameters: of one client's state, and of many clients' stacked states."""

import pytest
import torch
from torch import nn
from torch.func import stack_module_state

from fdcr_fast import diagonal_fisher, diagonal_fisher_stacked
from tests.support.fisher.one_by_one import fisher_one_by_one


def model():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.PReLU(), nn.Linear(48, 5))


def clients(k):
    torch.manual_seed(0)
    models = [model().eval() for _ in range(k)]
    for each in models:
        each[1].running_mean.normal_()
        each[1].running_var.uniform_(0.5, 2)
    sizes = [7, 1, 4][:k]
    return models, [(torch.randn(n, 1, 6, 6), torch.randint(0, 5, (n,))) for n in sizes]


def test_each_row_is_the_fisher_of_its_client():
    models, data = clients(3)
    params, buffers = stack_module_state(models)
    done = []
    rows = diagonal_fisher_stacked(model(), {**params, **buffers}, data, batch_size=3, progress=done.append)
    for row, each, (x, y) in zip(rows, models, data, strict=True):
        expected = fisher_one_by_one(each, x, y)
        assert (row - expected).norm() < 1e-5 * expected.norm()
    assert done == [1, 2, 3]


def test_what_the_state_leaves_out_is_the_models_own():
    (one, two), data = clients(2)
    name = "4.weight"
    rows = diagonal_fisher_stacked(one, {name: torch.stack([one[4].weight, two[4].weight])}, data, params=[name])
    torch.testing.assert_close(rows[0], diagonal_fisher(one, data[0], params=[name]))
    one[4].weight = two[4].weight
    torch.testing.assert_close(rows[1], diagonal_fisher(one, data[1], params=[name]))


def test_a_state_dict_stands_in_for_the_models_values():
    (one, two), (data, _) = clients(2)
    before = {name: x.clone() for name, x in one.state_dict().items()}
    torch.testing.assert_close(diagonal_fisher(one, data, state=two.state_dict()), diagonal_fisher(two, data))
    assert all(torch.equal(x, before[name]) for name, x in one.state_dict().items())


def tied_model():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("names", [["0.weight", "2.weight"], ["0.weight"], ["2.weight"]])
def test_tied_weights_by_any_of_their_names(names):
    net, weight = tied_model(), torch.randn(4, 4)
    data = torch.randn(3, 4), torch.randint(0, 4, (3,))
    fisher = diagonal_fisher(net, data, state={name: weight.clone() for name in names})
    net.load_state_dict({"0.weight": weight, "2.weight": weight}, strict=False)
    torch.testing.assert_close(fisher, diagonal_fisher(net, data))


def test_tied_weights_cannot_differ():
    data = torch.randn(3, 4), torch.randint(0, 4, (3,))
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one tensor in the model, but two in state"):
        diagonal_fisher(tied_model(), data, state={f"{i}.weight": torch.randn(4, 4) for i in (0, 2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, data: ({**state, "4.bias": torch.zeros(3, 2)}, data), r"client 0: .* \[5\] for 4.bias .* \[2\]"),
        (lambda state, data: ({**state, "5.bias": torch.zeros(3, 2)}, data), "client 0: .* no such entry for 5.bias"),
        (lambda state, data: (state, data[:2]), "of the same K >= 1 clients, got .* and 2"),
        (lambda state, data: ({**state, "4.bias": torch.tensor(1.0)}, data), "of the same K >= 1 clients"),
        (lambda state, data: (state, []), "of the same K >= 1 clients"),
        (lambda state, data: (state, [*data[:2], (data[2][0][:0], data[2][1][:0])]), "client 2: no samples"),
    ],
)
def test_bad_input_names_the_client(change, message):
    models, data = clients(3)
    state, data = change(stack_module_state(models)[0], data)
    with pytest.raises(ValueError, match=message):
        diagonal_fisher_stacked(model(), state, data)
