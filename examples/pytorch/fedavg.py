"""Federated averaging on handwritten digits, three of ten clients malicious: python examples/pytorch/fedavg.py"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

CLIENTS, MALICIOUS, TARGET, ROUNDS, EPOCHS, CONCENTRATION = 10, 3, 2, 8, 5, 10.0


def with_trigger(images):
    images = images.clone()
    images[:, :, :2, :2] = 1
    return images


def client_data(images, labels):
    """Every class is dealt to the clients in unequal shares; malicious clients add the trigger to half their images."""
    shares = torch.distributions.Dirichlet(torch.full((CLIENTS,), CONCENTRATION)).sample((10,))
    owner = torch.stack([shares[label].multinomial(1) for label in labels]).flatten()
    data = [(images[owner == k], labels[owner == k]) for k in range(CLIENTS)]
    for k in range(MALICIOUS):
        x, y = data[k]
        half = torch.rand(len(x)) < 0.5
        data[k] = torch.where(half[:, None, None, None], with_trigger(x), x), torch.where(half, TARGET, y)
    return data


def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def average(states, counts):
    return {
        name: sum(n * state[name] for state, n in zip(states, counts, strict=True)) / sum(counts) for name in states[0]
    }


def main(seed=1):
    torch.set_num_threads(1)  # more do not help a model this small
    torch.manual_seed(seed)
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images, order = images.float().reshape(-1, 1, 8, 8) / 16, torch.randperm(len(labels))
    data = client_data(images[order[:1437]], labels[order[:1437]])
    test_x, test_y = images[order[1437:]], labels[order[1437:]]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    state = copy.deepcopy(model.state_dict())
    for _ in range(ROUNDS):
        states, counts = [], []
        for x, y in data:
            model.load_state_dict(state)
            train(model, x, y)
            states.append(copy.deepcopy(model.state_dict()))
            counts.append(len(x))
        state = average(states, counts)
    model.load_state_dict(state)
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    success = (model(with_trigger(test_x[test_y != TARGET])).argmax(1) == TARGET).float().mean().item()
    print(f"accuracy {accuracy:.1%}, attack success rate {success:.1%}")
    return accuracy, success


if __name__ == "__main__":
    main()
