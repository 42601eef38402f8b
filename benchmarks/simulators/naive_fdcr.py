"""The same with FDCR as published: the Fisher sample by sample, and the server vector by vector."""

import copy
import platform

import task
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench_aggregation import published

task.use_threads()
images, labels = map(torch.from_numpy, task.load())
server, batch = task.model(), task.current(task.ARGUMENTS[0]).batch


def flat(tensors):
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def fisher_of(client, data):
    total = [torch.zeros_like(p) for p in client.parameters()]
    for x, y in DataLoader(data, 1):
        for squares, grad in zip(
            total, torch.autograd.grad(F.cross_entropy(client(x), y), list(client.parameters())), strict=True
        ):
            squares += grad.square()
    return flat(total) / len(data)


def one_round(count):
    w = flat(server.parameters())
    updates, fishers = [], []
    for x, y in zip(images[:count], labels[:count], strict=True):
        client, data = copy.deepcopy(server), TensorDataset(x, y)
        optimizer = task.sgd(client)
        for inputs, targets in DataLoader(data, batch, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(client(inputs), targets).backward()
            optimizer.step()
        updates.append(flat(client.parameters()) - w)
        fishers.append(fisher_of(client, data))
    new, _ = published(w, updates, fishers, torch.full((count,), float(images.shape[1]), dtype=torch.float64))
    torch.nn.utils.vector_to_parameters(new, server.parameters())


task.time_rounds(f"torch {torch.__version__}, Python {platform.python_version()}", one_round)
