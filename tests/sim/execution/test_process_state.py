"""What users' code changes in a process that others use after it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fdcr_fast.sim.execution.process_state import process_state_kept
from tests.support import users


def state() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        dict(os.environ),
        os.getcwd(),
    ]


def test_settings_are_what_they_were_also_after_an_error() -> None:
    before, within = state(), []

    def fail() -> None:
        users.Leaving(3).train()(users.colours(2)[0])
        torch.set_float32_matmul_precision("medium")
        within.extend(state())
        raise KeyError

    with pytest.raises(KeyError), process_state_kept():
        fail()
    assert not any(one == other for one, other in zip(within, before, strict=True))
    assert state() == before
