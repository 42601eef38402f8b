"""Models as files ``*.safetensors``: what a run begins with, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fdcr_fast.layout import by_plain_name
from fdcr_fast.sim.training.base import Classifier


def load_model(classifier: Classifier, path: Path) -> None:
    """Set parameters and buffers to those of a file, by their names in a state dict; wrappers' prefixes do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, has other names or shapes than the model, or numbers that are not finite where
            the model's are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"init: no file {path}")
    try:
        found = by_plain_name(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"init: {path} is no file of safetensors: {error}") from error
    own = by_plain_name(classifier.model.state_dict())
    problems = [f"no {name}" for name in own if name not in found]
    problems += [f"{name}, which the model has not" for name in found if name not in own]
    problems += [
        f"{name} {list(found[name].shape)}, which is {list(value.shape)} in the model"
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"init: {path} does not fit the model, it has {'; '.join(problems)}")
    wrong = [name for name, value in own.items() if not (found[name].isfinite() | ~value.isfinite()).all()]
    if wrong:
        raise ValueError(f"init: {path} has numbers that are not finite in {', '.join(wrong)}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def model_bytes(state: Mapping[str, Tensor]) -> bytes:
    """The content of a file of a state dict; what several names share is written for each."""
    return save({name: value.contiguous().clone() for name, value in state.items()})
