"""The stages of an attack, from the names of a configuration and from an object of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS, OMNISCIENT_FISHERS, FisherKnowledge
from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS, TrainingKnowledge
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES, COLLUDING_UPDATES, UpdateKnowledge
from fdcr_fast.sim.imports import title
from fdcr_fast.sim.training.objective import Objective

HOOKS = ("poison", "objective", "update", "fisher")


class DataPoison(Protocol):
    """What attackers do to their data, and which test images tell whether that worked."""

    @property
    def target(self) -> int:
        """The class that the victims should be taken for."""

    def poison(
        self, images: Tensor, labels: Tensor, attacker: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`fdcr_fast.sim.attacks.poison.Poisoning.poison`."""

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`fdcr_fast.sim.attacks.poison.Poisoning.victims`."""


@dataclass(frozen=True, eq=False)
class UsersPoison:
    """The data stage of an attack of the user's; without its hooks data stay as they are, and nobody is a victim.

    Attributes:
        attack: The user's object.
        target: The class that its victims should be taken for.
    """

    attack: Any
    target: int

    def poison(
        self, images: Tensor, labels: Tensor, attacker: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the attack makes of a client's data, which are copied before.

        Raises:
            ValueError: it returns something else than as many images of the same shape as labels.
        """
        if not hasattr(self.attack, "poison"):
            return images, labels
        returned = self.attack.poison(images.clone(), labels.clone(), attacker, generator)
        if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, Tensor) for x in returned)):
            raise ValueError(f"{self._hook('poison')} must return (images, labels), got {_shown(returned)}")
        poisoned, called = returned
        kind, fits = (images.shape[1:], images.dtype), len(called) == len(poisoned) > 0
        if (
            (poisoned.shape[1:], poisoned.dtype) != kind
            or (called.shape[1:], called.dtype) != ((), torch.int64)
            or not fits
        ):
            raise ValueError(
                f"{self._hook('poison')} must return images like {_shown(images)} with a label int64 each, got "
                f"{_shown(poisoned)} and {_shown(called)}"
            )
        return poisoned, called

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """The test images that the attack says should be taken for the target class.

        Raises:
            ValueError: it returns something else than images of the same shape.
        """
        if not hasattr(self.attack, "victims"):
            return images[:0]
        victims = self.attack.victims(images.clone(), labels.clone())
        if not isinstance(victims, Tensor) or (victims.shape[1:], victims.dtype) != (images.shape[1:], images.dtype):
            raise ValueError(f"{self._hook('victims')} must return images like {_shown(images)}, got {_shown(victims)}")
        return victims

    def _hook(self, name: str) -> str:
        return f"attack: {name} of {title(self.attack)}"


@dataclass(frozen=True, eq=False)
class Stages:
    """What attackers do once their data are poisoned.

    Attributes:
        objective: How they train; see ``ATTACKER_TRAININGS``.
        update: What they send of it; see ``ATTACKER_UPDATES``.
        fisher: Which Fisher they send; see ``ATTACKER_FISHERS``.
        sees_updates: Whether ``update`` looks at the others'.
        sees_fishers: Whether ``fisher`` looks at those of the benign clients.
    """

    objective: Callable[[TrainingKnowledge], Objective | None]
    update: Callable[[UpdateKnowledge], Tensor]
    fisher: Callable[[FisherKnowledge], Tensor]
    sees_updates: bool
    sees_fishers: bool

    @classmethod
    def of(cls, training: str, update: str, fisher: str, attack: Any = None) -> Stages:
        """The rows of these names, or the hooks of a user's attack instead of them.

        A user's attack is any object with one or more of the hooks ``poison(images, labels, attacker, generator)``,
        ``victims(images, labels)``, ``objective(known)``, ``update(known)`` and ``fisher(known)``: the first two as
        methods of :class:`fdcr_fast.sim.attacks.poison.Poisoning`, with ``target``, the others as functions of the
        tables. It has ``sees_updates = True`` or ``sees_fishers = True`` if its update or Fisher depends on the
        others'. A stage without a hook is as configured.
        """
        own_update, own_fisher = getattr(attack, "update", None), getattr(attack, "fisher", None)
        return cls(
            getattr(attack, "objective", None) or ATTACKER_TRAININGS[training],
            own_update or ATTACKER_UPDATES[update],
            own_fisher or ATTACKER_FISHERS[fisher],
            getattr(attack, "sees_updates", False) if own_update else update in COLLUDING_UPDATES,
            getattr(attack, "sees_fishers", False) if own_fisher else fisher in OMNISCIENT_FISHERS,
        )


def checked(vector: Any, like: str, num_params: int) -> Tensor:
    """What a stage sends.

    Raises:
        ValueError: it is no vector ``[P]``.
    """
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (num_params,):
        raise ValueError(f"attack: {like} must be a vector of {num_params} numbers, got {_shown(vector)}")
    return vector


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
