"""The models of the Fisher benchmarks, and a batch for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """A model in eval mode, and a batch of classified samples."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def part(self, first: int, n: int) -> Problem:
        """The same model on n of the samples."""
        samples = slice(first, first + n)
        return Problem(self.name, self.model, self.inputs[samples], self.targets[samples])


def lenet() -> nn.Module:
    """LeNet-5 on colour images."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def three_convolutions() -> nn.Module:
    """Three convolutions (32, 64, 128) and two linear layers."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def grouped() -> nn.Module:
    """Grouped, depthwise, strided, dilated and pointwise convolutions."""
    convolutions = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=4),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 128, 1),
        nn.Conv2d(128, 128, 5, stride=2, padding=4, dilation=2, groups=8),
    ]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


class ResidualBlock(nn.Module):
    """Basic block of a ResNet, without operations in place, which some peers do not allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 in its CIFAR form: a 3x3 stem and no max-pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    in_channels = 64
    for out_channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [
            ResidualBlock(in_channels, out_channels, stride),
            ResidualBlock(out_channels, out_channels, 1),
        ]
        in_channels = out_channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))
    # Running statistics as after training, so that activations keep their scale in eval mode.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(32, 3, 32, 32))
    return model


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward network out of plain layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Classifier of token sequences; positions are sinusoids, so every parameter is in a layer."""

    positions: Tensor

    def __init__(self, vocabulary: int = 4096, width: int = 256, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        angle = torch.arange(512).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)).mean(1))


def vision_transformer() -> nn.Module:
    """Of torchvision, on images of CIFAR's size: tokens, positions and packed projections are no layers."""
    model = VisionTransformer(32, 4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zero would stop all gradients
    return model


class CharacterLSTM(nn.Module):
    """The next character's class after a text, as in the federated Shakespeare task."""

    def __init__(self, characters: int = 80, width: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(text))[0][:, -1])


def _images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32)


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LeNet-like CNN, 256": (lenet, lambda: _images(256)),
    "3-conv CNN (32-64-128), 128": (three_convolutions, lambda: _images(128)),
    "grouped/strided/dilated CNN, 128": (grouped, lambda: _images(128)),
    "ResNet-18 (CIFAR form, eval), 64": (resnet18, lambda: _images(64)),
    "transformer (4 layers, d 256, T 128), 32": (Transformer, lambda: torch.randint(4096, (32, 128))),
    "Vision Transformer (6 layers, d 192, T 65), 32": (vision_transformer, lambda: _images(32)),
    "character LSTM (2 layers, 256), 64": (CharacterLSTM, lambda: torch.randint(80, (64, 80))),
}


def problem(name: str) -> Problem:
    torch.manual_seed(0)
    make_model, make_inputs = PROBLEMS[name]
    model, inputs = make_model().eval(), make_inputs()
    return Problem(name, model, inputs, torch.randint(CLASSES, (len(inputs),)))
