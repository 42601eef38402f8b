"""Models for texts as bytes: which byte is next, or what a text says. An input is ``[T]`` tokens in 0..255."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BYTES = 256


class _LSTM(nn.Module):
    def __init__(self, num_classes: int, embedding: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, embedding)
        self.lstm = nn.LSTM(embedding, width, layers, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


class _Transformer(nn.Module):
    def __init__(self, length: int, num_classes: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.randn(length, width) / math.sqrt(width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))
        return logits


def lstm(
    image_shape: tuple[int, ...], num_classes: int, embedding: int = 8, width: int = 256, layers: int = 2
) -> nn.Module:
    """The LSTM of LEAF for Shakespeare (Caldas et al. 2018, arXiv:1812.01097): embeddings of 8, two layers of 256.

    Args:
        image_shape: ``(T,)``.
        num_classes: Number of classes.
        embedding: Width of the embeddings.
        width: Width of a layer.
        layers: Number of layers.

    Raises:
        ValueError: inputs are no sequences.
    """
    _length("lstm", image_shape)
    return _LSTM(num_classes, embedding, width, layers)


def transformer(
    image_shape: tuple[int, ...], num_classes: int, width: int = 64, heads: int = 4, layers: int = 2
) -> nn.Module:
    """A small encoder: learned positions, normalisation before every layer, the mean of all positions at the end.

    Args:
        image_shape: ``(T,)``.
        num_classes: Number of classes.
        width: Width of a layer.
        heads: Number of heads.
        layers: Number of layers.

    Raises:
        ValueError: inputs are no sequences.
    """
    return _Transformer(_length("transformer", image_shape), num_classes, width, heads, layers)


def _length(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise ValueError(f"model: {name} needs sequences of tokens [T], the inputs are {list(shape)}")
    return shape[0]
