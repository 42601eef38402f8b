"""ResNet-18 and other models of the field, and a federation of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fdcr_fast import _native
from fdcr_fast.sim import FederatedData, SimulationConfig, simulate
from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.network import network_layers


def norms(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if "Norm" in type(module).__name__}


@pytest.mark.parametrize(
    ("name", "shape", "parameters", "normalised"),
    [
        ("resnet18", (3, 32, 32), 11_173_962, {nn.BatchNorm2d}),  # as in kuangliu/pytorch-cifar
        ("resnet18-gn", (3, 32, 32), 11_173_962, {nn.GroupNorm}),
        ("vgg11", (3, 32, 32), 9_225_610, set()),
        ("lenet", (1, 28, 28), 61_706, set()),
        ("vit", (3, 32, 32), 2_693_578, {nn.LayerNorm}),
    ],
)
def test_models_of_the_field(
    name: str, shape: tuple[int, ...], parameters: int, normalised: set[type[nn.Module]]
) -> None:
    model = build_model(name, shape, 10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert norms(model) == normalised
    output = model.eval()(torch.randn(2, *shape))
    assert output.shape == (2, 10)
    assert 0 < output.std() < 10
    sizes = []
    model.apply(lambda module: sizes.append(getattr(module, "stride", None)) if isinstance(module, nn.Conv2d) else None)
    if name.startswith("resnet18"):
        assert sizes[0] == (1, 1), "no stride at first, as images are small"
    assert (network_layers(model) is not None) == (name == "lenet")


def test_inputs_that_a_model_cannot_take_are_named() -> None:
    for name, shape, message in (
        ("resnet18", (40,), r"resnet18 needs images \[C, H, W\].*\[40\]"),
        ("vit", (1, 30, 30), "multiples of 4"),
        ("vit", (1, 32, 28), "square"),
        ("lenet", (1, 11, 11), "at least 12x12"),
        ("cnn", (40,), r"cnn needs images"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(name, shape, 3, seed=0)
    with pytest.raises(ValueError, match=r"model_options: .*width"):
        build_model("mlp", (4,), 3, 0, {"width": 5})


@pytest.mark.skipif(_native.module is None, reason="takes minutes without kernels")
def test_resnet18_with_badnets_and_coalition_fdcr() -> None:
    """Two rounds on 5,000 images of CIFAR's shape.

    To train on all of them would take five minutes on two cores, and Fishers four: clients, of 500 images on average,
    train two batches of 16 in each round and take the Fisher of 16.
    """
    count, tested = 5000, 40
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count + tested) % 10
    colours = torch.randn(10, 3, 1, 1, generator=generator)
    images = (colours[labels] + 0.3 * torch.randn(len(labels), 3, 32, 32, generator=generator)).clamp(-1, 1)
    config = SimulationConfig(
        model="resnet18",
        attack="badnets",
        server="coalition-fdcr",
        malicious=(0, 1, 2),
        rounds=2,
        local_steps=2,
        batch_size=16,
        fisher_samples=16,
    )
    data = FederatedData(train=(images[:count], labels[:count]), test=(images[count:], labels[count:]))
    result = simulate(config, data=data)
    assert sum(record.num_samples for record in result.clients if record.round == 1) == count
    assert not [record.reason for record in result.clients if record.reason]
    assert len(result.params) == 11_173_962
    assert result.params.isfinite().all()
    assert result.buffers.isfinite().all()
    assert all(record.kept < 10 and record.attack_success_rate is not None for record in result.rounds)
