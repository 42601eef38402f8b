"""What a server knows when it makes its rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from fdcr_fast.rules.param_groups import ParamGroups


class ModelQuality(NamedTuple):
    """How a model does on the server's data.

    Attributes:
        entropy: Mean entropy of the predicted distributions, in nats.
        loss: Mean loss.
    """

    entropy: float
    loss: float


class ServerData(Protocol):
    """What a server can do with data that no client has."""

    def refine(self, params: Tensor) -> Tensor:
        """Better parameters ``[P]`` than these."""

    def update(self, params: Tensor) -> Tensor:
        """What training from ``params`` on changes in them, ``[P]``."""

    def evaluate(self, params: Tensor) -> ModelQuality:
        """How the model with these parameters does."""


@dataclass(frozen=True)
class ServerOptions:
    """What a server knows when it makes its rule; nothing in it says who is malicious.

    Attributes:
        learning_rate: The clients' learning rate.
        groups: Parameters of the model's head and features; None where the model is not known.
        num_byzantine: How many clients may be Byzantine, a public assumption.
        noise_seed: Seed of draws that clients must not foresee.
        data: The server's own data; None for a server without.
    """

    learning_rate: float
    groups: ParamGroups | None
    num_byzantine: int
    noise_seed: int
    data: ServerData | None

    def needed_data(self) -> ServerData:
        """The server's data, for a rule that needs them.

        Raises:
            ValueError: there are none.
        """
        if self.data is None:
            raise ValueError("this rule needs data of the server")
        return self.data
