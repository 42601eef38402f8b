"""The models that clients train."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fdcr_fast.sim.seeding import derive_seed, with_torch_seed

Shape = tuple[int, int, int]
CNN_MIN_PIXELS = 16


def paper_cnn(image_shape: Shape, num_classes: int) -> nn.Module:
    """The paper's CNN: two 5x5 convolutions (6, 16) with pooling, then 120, 84, 84, 256 and the classes.

    ReLU follows every hidden layer but the one of 256.

    Raises:
        ValueError: the image is too small for two convolutions with pooling.
    """
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
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 64), nn.ReLU(), nn.Linear(64, num_classes))


def auto(image_shape: Shape, num_classes: int) -> nn.Module:
    """The paper's CNN where the image is large enough, else the MLP."""
    large = min(image_shape[1:]) >= CNN_MIN_PIXELS
    return (paper_cnn if large else mlp)(image_shape, num_classes)


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {"auto": auto, "cnn": paper_cnn, "mlp": mlp}


def build_model(name: str, image_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """A model of ``MODELS`` with initial weights that depend on the seed only."""
    return with_torch_seed(derive_seed(seed, "model"), lambda: MODELS[name](image_shape, num_classes))
