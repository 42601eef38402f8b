"""A model with parameters and buffers, and clients that trained it: the same for every framework."""

from __future__ import annotations

import torch
from torch import nn

from fdcr_fast import FDCR, ParamLayout, aggregate_state_dicts

K = 6
COUNTS = [3, 1, 4, 1, 5, 9]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


class Client:
    def __init__(self, k):
        self.k, self.num_samples = k, COUNTS[k]
        layout = ParamLayout.from_module(network())
        torch.manual_seed(100 + k)
        self.step = torch.rand(layout.numel)
        self.fisher = torch.rand(layout.numel)

    def trained(self, state):
        """A model from the state sent out."""
        model = network()
        model.load_state_dict(state)
        with torch.no_grad():
            update = ParamLayout.from_module(model).unflatten(self.step)
            for name, parameter in model.named_parameters():
                parameter += update[name]
            model[1].running_mean += self.k
            model[1].num_batches_tracked += 10 * self.k
        return model


def expected(state, clients, rule=None):
    """The rule's answer, by the function for plain PyTorch."""
    states = {client.k: client.trained(state).state_dict() for client in clients}
    fishers = {client.k: client.fisher for client in clients}
    counts = {client.k: client.num_samples for client in clients}
    return aggregate_state_dicts(state, states, fishers, counts, rule=rule or FDCR(), return_result=True)


def assert_same_state(state, other):
    assert list(state) == list(other)
    for name, value in other.items():
        torch.testing.assert_close(torch.as_tensor(state[name]), value)
