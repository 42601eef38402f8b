"""The models that clients train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from fdcr_fast.sim.seeding import derive_seed, with_torch_seed
from fdcr_fast.sim.training.vision import group_norm, lenet, resnet18, vgg11, vit

Shape = tuple[int, ...]
CNN_MIN_PIXELS = 16


def paper_cnn(image_shape: Shape, num_classes: int) -> nn.Module:
    """The paper's CNN: two 5x5 convolutions (6, 16) with pooling, then 120, 84, 84, 256 and the classes.

    ReLU follows every hidden layer but the one of 256.

    Raises:
        ValueError: inputs are no images, or too small for two convolutions with pooling.
    """
    if len(image_shape) != 3:
        raise ValueError(f"model: cnn needs images [C, H, W], the inputs are {list(image_shape)}")
    channels, height, width = image_shape
    if min(height, width) < CNN_MIN_PIXELS:
        raise ValueError(
            f"model: cnn needs images of at least {CNN_MIN_PIXELS}x{CNN_MIN_PIXELS} pixels, got "
            f"{height}x{width}; choose mlp or auto"
        )

    def after_two_stages(pixels: int) -> int:
        return ((pixels - 4) // 2 - 4) // 2

    return nn.Sequential(
        # ReLU and max-pooling commute; pooling first leaves ReLU a quarter of the work.
        nn.Conv2d(channels, 6, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * after_two_stages(height) * after_two_stages(width), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 84),
        nn.ReLU(),
        nn.Linear(84, 256),
        nn.Linear(256, num_classes),
    )


def mlp(image_shape: Shape, num_classes: int) -> nn.Module:
    """One hidden layer of 64."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 64), nn.ReLU(), nn.Linear(64, num_classes))


def auto(image_shape: Shape, num_classes: int) -> nn.Module:
    """The paper's CNN where the image is large enough, else the MLP."""
    large = len(image_shape) == 3 and min(image_shape[1:]) >= CNN_MIN_PIXELS
    return (paper_cnn if large else mlp)(image_shape, num_classes)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "auto": auto,
    "cnn": paper_cnn,
    "mlp": mlp,
    "lenet": lenet,
    "resnet18": resnet18,
    "resnet18-gn": partial(resnet18, norm=group_norm),
    "vgg11": vgg11,
    "vit": vit,
}


def build_model(
    model: str | Callable[[Mapping[str, Any]], nn.Module],
    image_shape: Shape,
    num_classes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model with initial weights that depend on the seed only.

    Args:
        model: A name in ``MODELS``, or a function of ``{"image_shape": ..., "num_classes": ...}``.
        image_shape: Shape of an input.
        num_classes: Number of classes.
        seed: The seed.
        options: Further arguments of the function of a name.

    Raises:
        ValueError: the function of a name takes no such options, or cannot make a model for such inputs, or a function
            returns no module.
    """
    known = {"image_shape": image_shape, "num_classes": num_classes}

    def build() -> nn.Module:
        if not isinstance(model, str):
            return model(known)
        try:
            return MODELS[model](**known, **(options or {}))
        except TypeError as error:
            raise ValueError(f"model_options: {error}") from error

    built = with_torch_seed(derive_seed(seed, "model"), build)
    if not isinstance(built, nn.Module):
        raise ValueError(f"model: expected a function that returns an nn.Module, it returned a {type(built).__name__}")
    return built
