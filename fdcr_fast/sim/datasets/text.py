"""Texts as bytes: to predict the next one, or the class of a text. Every writer or file is a client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdcr_fast.sim.datasets.federated import FederatedData

TEST_SHARE = 0.2  # of every text, its end
PADDING = 0


def next_byte(data_dir: Path | None, clients: int, length: int = 80, stride: int = 1) -> FederatedData:
    """The files ``*.txt`` of a folder, the longest first, one for each client: ``length`` bytes, and the next one.

    Args:
        data_dir: The folder.
        clients: Number of clients.
        length: Bytes of an input.
        stride: Bytes between the beginnings of two training samples; test samples do not overlap.

    Raises:
        FileNotFoundError: there are fewer files.
        ValueError: a text is too short.
    """
    found = [] if data_dir is None else sorted(data_dir.glob("*.txt"))
    if len(found) < clients:
        raise FileNotFoundError(
            f"text: {clients} clients need as many files *.txt in data_dir, {data_dir} has {len(found)}"
        )
    return _next_bytes((path.read_bytes() for path in found), clients, length, stride)


def python_topics(clients: int, length: int = 80, stride: int = 8) -> FederatedData:
    """The topics of Python's ``help()``, the longest first, one for each client: ``length`` bytes, and the next one.

    They come with every Python, and differ a little from version to version.

    Raises:
        ValueError: there are not so many topics that are long enough.
    """
    from pydoc_data.topics import topics

    return _next_bytes((topic.encode() for topic in topics.values()), clients, length, stride)


def text_classes(data_dir: Path | None, length: int = 256) -> FederatedData:
    """Texts in folders named by their classes, such as IMDB's reviews: ``train/CLASS/*.txt`` and ``test/CLASS/*.txt``.

    Classes are counted in the order of their names; texts are cut at ``length`` bytes, or begin with bytes of 0.

    Raises:
        FileNotFoundError: there are no such files.
    """
    sets = []
    for part in ("train", "test"):
        folder = Path() if data_dir is None else data_dir / part
        classes = [] if data_dir is None else sorted(path for path in folder.iterdir() if path.is_dir())
        texts = [(path.read_bytes(), label) for label, of in enumerate(classes) for path in sorted(of.glob("*.txt"))]
        if not texts:
            raise FileNotFoundError(f"text-classes: no files CLASS/*.txt in {folder}; nothing is downloaded")
        inputs = torch.full((len(texts), length), PADDING, dtype=torch.int64)
        for row, (text, _) in zip(inputs, texts, strict=True):
            tokens = _tokens(text[:length])
            row[length - len(tokens) :] = tokens
        sets.append((inputs, torch.tensor([label for _, label in texts])))
    return FederatedData(train=sets[0], test=sets[1])


def _next_bytes(texts: Iterable[bytes], clients: int, length: int, stride: int) -> FederatedData:
    longest = sorted(texts, key=len, reverse=True)[:clients]
    train, test = [], []
    for client, text in enumerate(longest):
        tokens = _tokens(text)
        cut = round((1 - TEST_SHARE) * len(tokens))
        if min(cut, len(tokens) - cut) <= length:
            raise ValueError(f"text: that of client {client} has {len(text)} bytes, too few for windows of {length}")
        train.append(_windows(tokens[:cut], length, stride))
        test.append(_windows(tokens[cut:], length, length))
    if len(longest) < clients:
        raise ValueError(f"text: there are {len(longest)} texts, too few for {clients} clients")
    return FederatedData(train=train, test=_joined(test))


def _tokens(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def _windows(tokens: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    windows = tokens.unfold(0, length + 1, stride)
    return windows[:, :-1].clone(), windows[:, -1].clone()


def _joined(sets: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([inputs for inputs, _ in sets]), torch.cat([labels for _, labels in sets])
