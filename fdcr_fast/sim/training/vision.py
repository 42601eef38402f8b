"""Models of the field for images, torchvision's in their forms for small ones, such as CIFAR's of 32 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

GROUPS = 32  # of GroupNorm, as in Wu and He 2018 (arXiv:1803.08494), or all channels where there are fewer


def _images(name: str, image_shape: tuple[int, ...], multiple: int) -> tuple[int, int, int]:
    """``(C, H, W)`` of inputs that a model can take.

    Raises:
        ValueError: they are no images, or not of a size that can be divided so.
    """
    if len(image_shape) != 3 or any(pixels % multiple or not pixels for pixels in image_shape[1:]):
        raise ValueError(
            f"model: {name} needs images [C, H, W] of a height and width that are multiples of {multiple}, the inputs "
            f"are {list(image_shape)}"
        )
    channels, height, width = image_shape
    return channels, height, width


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of as many as there are channels."""
    return nn.GroupNorm(min(GROUPS, channels), channels)


def resnet18(
    image_shape: tuple[int, ...], num_classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """ResNet-18 for small images: a first convolution of 3x3 without stride, and no pooling after it (He et al. 2016,
    arXiv:1512.03385, section 4.2).

    Args:
        image_shape: ``(C, H, W)``.
        num_classes: Number of classes.
        norm: Makes the normalisation of so many channels.

    Raises:
        ValueError: inputs are no images.
    """
    from torchvision.models import resnet18 as of_torchvision

    channels, _, _ = _images("resnet18", image_shape, 1)
    model: Any = of_torchvision(num_classes=num_classes, norm_layer=norm)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return cast(nn.Module, model)


def vgg11(image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The convolutions of VGG-11 (Simonyan and Zisserman 2015, arXiv:1409.1556), and one linear layer.

    Raises:
        ValueError: inputs are no images.
    """
    from torchvision.models.vgg import cfgs, make_layers

    channels, height, width = _images("vgg11", image_shape, 1)
    features = make_layers(cfgs["A"])
    features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
        elif isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True  # an image that is too small to be halved again stays as it is
    positions = math.ceil(height / 32) * math.ceil(width / 32)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(512 * positions, num_classes))


def vit(image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A small Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): patches of 4x4, 6 layers of width 192.

    Raises:
        ValueError: inputs are no square images of a size that can be divided by 4.
    """
    from torchvision.models import VisionTransformer

    channels, height, width = _images("vit", image_shape, 4)
    if height != width:
        raise ValueError(f"model: vit needs square images, the inputs are {list(image_shape)}")
    model: Any = VisionTransformer(
        image_size=height,
        patch_size=4,
        num_layers=6,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=num_classes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    model.conv_proj = nn.Conv2d(channels, 192, 4, stride=4)
    nn.init.trunc_normal_(
        model.heads.head.weight, std=0.02
    )  # torchvision begins with zeros, which train no other layer
    return cast(nn.Module, model)


def lenet(image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 as it is used today (LeCun et al. 1998): 5x5 convolutions (6, 16) with pooling, 120, 84 and the classes.

    Raises:
        ValueError: inputs are no images, or too small.
    """
    channels, height, width = _images("lenet", image_shape, 1)
    rows, columns = ((pixels // 2 - 4) // 2 for pixels in (height, width))
    if min(rows, columns) < 1:
        raise ValueError(f"model: lenet needs images of at least 12x12 pixels, got {height}x{width}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
