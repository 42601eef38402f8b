from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fdcr_fast.sim.models import build_model
from fdcr_fast.sim.training import Worker


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 18, 16), (1, 8, 8)])
def test_training_is_plain_sgd_with_momentum(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(50, *shape), torch.randint(0, 4, (50,))
    rows = torch.arange(3, 40)
    reference = build_model("auto", shape, 4, seed=0).double()
    worker = Worker(build_model("auto", shape, 4, seed=0))
    lr, momentum, decay = 0.05, 0.9, 1e-2
    worker.train(
        images,
        labels,
        rows,
        epochs=2,
        batch_size=16,
        lr=lr,
        momentum=momentum,
        weight_decay=decay,
        generator=torch.Generator().manual_seed(7),
    )

    generator = torch.Generator().manual_seed(7)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for _ in range(2):
        order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            log_p = reference(images[batch].double()).log_softmax(1)
            loss = -sum(log_p[i, labels[row]] for i, row in enumerate(batch)) / len(batch)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            with torch.no_grad():
                for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                    v.mul_(momentum).add_(g + decay * p)
                    p.sub_(lr * v)
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    assert (worker.params().double() - expected).norm() < 1e-5 * expected.norm()


def test_parameters_survive_loading() -> None:
    worker = Worker(build_model("cnn", (1, 16, 16), 3, seed=0))
    params = torch.randn(worker.layout.numel)
    worker.load(params)
    assert torch.equal(worker.params(), params)
    plain = copy.deepcopy(worker.model)
    offset = 0
    for parameter in plain.parameters():
        values = params[offset : offset + parameter.numel()].reshape(parameter.shape)
        assert torch.equal(parameter, values)
        offset += parameter.numel()


def test_fisher_squares_per_sample() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(20, 1, 16, 16), torch.randint(0, 3, (20,))
    rows = torch.tensor([1, 4, 7, 19])
    worker = Worker(build_model("cnn", (1, 16, 16), 3, seed=0))
    model = copy.deepcopy(worker.model).double()
    expected = torch.zeros(worker.layout.numel, dtype=torch.float64)
    for row in rows.tolist():
        log_p = model(images[row : row + 1].double()).log_softmax(1)[0, labels[row]]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(log_p, list(model.parameters()))])
        expected += gradient**2 / len(rows)
    fisher = worker.fisher(images, labels, rows)
    assert fisher.dtype == torch.float32
    assert (fisher.double() - expected).norm() < 1e-5 * expected.norm()


def test_prediction_is_the_most_probable_class() -> None:
    worker = Worker(build_model("mlp", (1, 8, 8), 5, seed=0))
    images = torch.randn(1500, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(worker.predict(images), worker.model(images).argmax(1))


def test_models_with_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        Worker(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)))
