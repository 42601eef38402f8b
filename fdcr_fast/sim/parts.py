"""What a run is made of besides settings: objects of the user's, given in Python or named in the configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.table import NamedRule
from fdcr_fast.sim.attacks.stages import HOOKS
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.datasets.dataset import Dataset
from fdcr_fast.sim.datasets.federated import FederatedData
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.imports import GIVEN, called, changed_fields, imported, is_users, name_of, title
from fdcr_fast.sim.training.autograd import Loss, OptimizerFactory


class Given(NamedTuple):
    """The objects that a caller gives; see :func:`fdcr_fast.sim.simulate`."""

    model: Any = None
    data: Any = None
    rule: Any = None
    attack: Any = None
    loss: Any = None
    optimizer: Any = None


NOTHING = Given()


class _Place(NamedTuple):
    """Where a configuration names an object: the kind of its name, the setting, and that of its arguments."""

    kind: str
    setting: str
    options: str | None


_PLACES = {
    "model": _Place("models", "model", "model_options"),
    "data": _Place("datasets", "dataset", "dataset_options"),
    "rule": _Place("rules", "server", "server_options"),
    "attack": _Place("attacks", "attack", "attack_options"),
    "loss": _Place("losses", "loss", None),
    "optimizer": _Place("optimizers", "optimizer", "optimizer_options"),
}


def named(config: SimulationConfig, given: Given) -> SimulationConfig:
    """The configuration with the names of what is given: import paths, from which the objects can be made again.

    What cannot be imported is named ``given:TYPE``, data with a fingerprint.
    """
    names: dict[str, Any] = {}
    for argument, value in given._asdict().items():
        if value is None:
            continue
        place = _PLACES[argument]
        path, options = name_of(value)
        if isinstance(value, FederatedData):
            path = f"{GIVEN}:FederatedData.{value.digest}"
        names[place.setting] = path
        if place.options is not None:
            before = {} if isinstance(value, AggregationRule) else getattr(config, place.options)
            names[place.options] = {**before, **options}
    return config.model_copy(update=names)


@dataclass(frozen=True)
class _GivenRule(NamedRule):
    """A rule as it is: one that is no dataclass, or has data of its server."""

    rule: AggregationRule | None = None

    def make(self, server: ServerOptions, options: Mapping[str, Any]) -> AggregationRule:
        """A copy of the rule, so that what it remembers of this run is not remembered in another."""
        rule = copy.deepcopy(self.rule)
        assert rule is not None
        rule.reset()
        return rule


@dataclass(frozen=True, eq=False)
class Parts:
    """The objects of a run that are the user's; None where the configuration names rows of tables.

    Attributes:
        model: Makes the model, of what it asks for by name.
        data: The data.
        rule: A row like those of ``RULES``.
        attack: An object with hooks, see :meth:`fdcr_fast.sim.attacks.stages.Stages.of`.
        loss: Losses of samples.
        optimizer: Makes the optimizer of a client.
    """

    model: Callable[[Mapping[str, Any]], nn.Module] | None
    data: FederatedData | None
    rule: NamedRule | None
    attack: Any
    loss: Loss | None
    optimizer: OptimizerFactory | None

    @classmethod
    def of(cls, config: SimulationConfig, given: Given = NOTHING) -> Parts:
        """What is given, and what the configuration names by import paths.

        Raises:
            TypeError: something given is not what it is given as.
            ValueError: something named cannot be imported or is not what it is named as, or something given has another
                name than in the configuration.
        """

        def found(argument: str) -> Any:
            value, (kind, setting, _) = getattr(given, argument), _PLACES[argument]
            if value is None and is_users(kind, getattr(config, setting)):
                try:
                    value = imported(kind, getattr(config, setting))
                except ValueError as error:
                    raise ValueError(f"{setting}: {error}") from error
            return value

        try:
            return cls(
                _function(found("model"), "model", config.model_options),
                _data(found("data"), config),
                _rule(found("rule")),
                _attack(found("attack"), config),
                _function(found("loss"), "loss"),
                _function(found("optimizer"), "optimizer", config.optimizer_options),
            )
        except TypeError as error:
            if given == NOTHING:  # names have no types: what is wrong is a value of a setting
                raise ValueError(str(error)) from error
            raise

    def dataset(self, config: SimulationConfig) -> Dataset:
        """The user's data, or those that the configuration names.

        Raises:
            FileNotFoundError: the data set's files are not there.
            ValueError: its arrays are not images and labels, or the data are of another number of clients.
        """
        return load_dataset(config.dataset, config.data_dir) if self.data is None else self.data.dataset


_RETURNS = {
    "model": "an nn.Module",
    "loss": "the losses [N] of outputs and labels",
    "optimizer": "an optimizer for parameters and a learning rate",
}


def _function(value: Any, name: str, options: Mapping[str, Any] | None = None) -> Any:
    if value is None:
        return None
    if not callable(value) or (isinstance(value, nn.Module) and name == "model"):
        raise TypeError(f"{name}: expected a function that returns {_RETURNS[name]}, got a {type(value).__name__}")
    if name == "model":
        return partial(called, value, options or {})
    return partial(value, **options) if options else value


def _data(value: Any, config: SimulationConfig) -> FederatedData | None:
    if value is None:
        return None
    if callable(value):
        value = called(value, config.dataset_options, {"data_dir": config.data_dir, "clients": config.clients})
    if not isinstance(value, FederatedData):
        raise TypeError(f"data: expected a FederatedData, or a function that returns one, got a {type(value).__name__}")
    if value.num_clients not in (None, config.clients):
        raise ValueError(
            f"clients: the data are of {value.num_clients} clients, the configuration says {config.clients}"
        )
    return value


def _rule(value: Any) -> NamedRule | None:
    if value is None:
        return None
    if isinstance(value, type) and issubclass(value, AggregationRule):
        return NamedRule(value)
    if not isinstance(value, AggregationRule):
        raise TypeError(f"rule: expected an AggregationRule, such as FedAvg(), got {value!r}")
    if dataclasses.is_dataclass(value) and not value.needs_server_data:
        return NamedRule(type(value), changed_fields(value))
    return _GivenRule(type(value), rule=value)


def _attack(value: Any, config: SimulationConfig) -> Any:
    hooked = any(callable(getattr(value, hook, None)) for hook in HOOKS)
    if isinstance(value, type) or (callable(value) and not hooked):
        value = called(value, config.attack_options, {})
    if value is not None and not any(callable(getattr(value, hook, None)) for hook in HOOKS):
        raise TypeError(f"attack: {title(value)} has none of the methods {', '.join(HOOKS)}")
    return value
