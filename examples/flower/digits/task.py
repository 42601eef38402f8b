"""Data, model and training."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

CLIENTS, TARGET, EPOCHS = 10, 2, 5
torch.set_num_threads(1)  # more do not help a model this small


class Network(nn.Sequential):
    """A perceptron that starts the same everywhere."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def with_trigger(images):
    images = images.clone()
    images[:, :, :2, :2] = 1
    return images


def digits():
    """Training and test set, the same for everybody who asks."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    images, labels = images.float().reshape(-1, 1, 8, 8)[order] / 16, labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def client_data(client, malicious, clients=CLIENTS):
    """A client's share; malicious ones add the trigger and the target class to half of it."""
    (images, labels), _ = digits()
    torch.manual_seed(1)
    shares = torch.distributions.Dirichlet(torch.full((clients,), 10.0)).sample((10,))
    owner = torch.stack([shares[label].multinomial(1) for label in labels]).flatten()
    x, y = images[owner == client], labels[owner == client]
    if malicious:
        half = torch.rand(len(x)) < 0.5
        x, y = torch.where(half[:, None, None, None], with_trigger(x), x), torch.where(half, TARGET, y)
    return x, y


def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


def evaluate(model):
    """Accuracy, and how often an image with the trigger is taken for the target class."""
    _, (x, y) = digits()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
        success = (model(with_trigger(x[y != TARGET])).argmax(1) == TARGET).float().mean().item()
    return accuracy, success
