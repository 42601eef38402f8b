"""Models, data, rules, attacks, losses, optimizers and callbacks of the user's: same bits, and what errors say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdcr_fast import AggregationRule, CoalitionFDCR, FedAvg, Selection
from fdcr_fast.sim import Callback, PartError, SimulationConfig, resume, simulate
from fdcr_fast.sim.clients.buffers import RoundBuffers
from fdcr_fast.sim.execution.forkserver import forkserver_context
from fdcr_fast.sim.run import figures
from tests.support import users
from tests.support.tiny import without_costs

PATHS = {
    "model": "tests.support.users:Residual",
    "dataset": "tests.support.users:data",
    "server": "tests.support.users:DropLargest",
    "attack": "tests.support.users:Corner",
    "loss": "tests.support.users:smooth",
    "optimizer": "tests.support.users:nesterov",
}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)


@pytest.fixture(scope="module")
def expected() -> Any:
    """An uninterrupted run in this process."""
    return simulate(users.config(), **users.EVERYTHING)


def assert_same(result: Any, expected: Any) -> None:
    assert torch.equal(result.params, expected.params)
    assert torch.equal(result.buffers, expected.buffers)
    assert without_costs(result) == without_costs(expected)
    assert result.clients == expected.clients


def test_everything_of_the_users_counts(expected: Any) -> None:
    assert not [client.reason for client in expected.clients if client.reason]
    assert all(record.kept == 3 for record in expected.rounds)
    assert expected.buffers[-1] == 9, "the kept clients' number of batches"
    for name in users.EVERYTHING:
        if name not in ("model", "data"):
            without = {key: value for key, value in users.EVERYTHING.items() if key != name}
            assert not torch.equal(simulate(users.config(), **without).params, expected.params), name


def test_names_in_a_configuration_give_the_same_bits(expected: Any) -> None:
    options = {"server_options": {"count": 2}, "attack_options": {"factor": 1.25}}
    assert_same(simulate(users.config(**PATHS, **options)), expected)
    by_object = {**PATHS, "server": "tests.support.users:DROP_TWO", "attack_options": {"factor": 1.25}}
    assert_same(simulate(users.config(**by_object)), expected)
    assert {name: getattr(expected.config, name) for name in PATHS} == PATHS


def test_any_number_of_workers_gives_the_same_bits(expected: Any) -> None:
    assert_same(simulate(users.config(workers=2), **users.EVERYTHING), expected)


def test_no_client_leaves_buffers_to_the_next_one() -> None:
    one, two = (simulate(users.config(workers=n), model=users.Noting, data=users.data) for n in (1, 2))
    assert_same(two, one)
    assert one.buffers[0] == 9, "3 batches in each round"
    assert not [record.reason for record in one.clients if record.reason]


def killed_run(folder: Path, data: bool) -> None:
    given = users.EVERYTHING if data else {**users.EVERYTHING, "data": users.data()}
    simulate(users.config(), folder, **given, callbacks=[users.Stop(2, partial(os._exit, 9))])


@pytest.mark.parametrize("by_path", [True, False])
def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path: Path, by_path: bool, expected: Any) -> None:
    process = forkserver_context().Process(target=killed_run, args=(tmp_path, by_path))
    process.start()
    process.join()
    assert process.exitcode == 9
    if by_path:
        resumed = resume(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"dataset: this run was given a FederatedData\.\w+ in Python.*resume"):
            resume(tmp_path)
        with pytest.raises(
            ValueError, match=r"dataset: the run in .* was begun with given:FederatedData\.\w+, got giv"
        ):
            resume(tmp_path, data=replace(users.data(), test=users.colours(60, seed=98)))
        resumed = resume(tmp_path, data=users.data())
    assert_same(resumed, expected)


def test_a_rule_that_is_given_is_not_changed(expected: Any) -> None:
    rule = users.DropLargest(count=2)
    first, again = (simulate(users.config(), **{**users.EVERYTHING, "rule": rule}) for _ in range(2))
    assert rule.seen == []
    assert_same(first, expected)
    assert_same(again, expected)
    by_class, by_object = (
        simulate(users.config(rounds=1), data=users.data, rule=rule)
        for rule in (users.DropLargest, users.DropLargest())
    )
    assert_same(by_class, by_object)
    named = simulate(users.config(server="coalition-fdcr"), data=users.data)
    given = simulate(users.config(), data=users.data, rule=CoalitionFDCR())
    assert_same(given, named)  # a server knows the groups of its model's parameters


class Recorder(Callback):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_start(self, config: SimulationConfig, folder: Path | None, finished: int) -> None:
        self.told.append(("start", config.clients, folder, finished))

    def on_round(self, round: Any) -> None:
        self.told.append((round.record, len(round.clients), round.state()))

    def on_end(self, result: Any) -> None:
        self.told.append(result)


def test_callbacks_are_told_of_every_round(tmp_path: Path) -> None:
    recorder = Recorder()
    result = simulate(users.config(rounds=2), tmp_path, data=users.data, model=users.Residual, callbacks=[recorder])
    start, first, second, end = recorder.told
    assert start == ("start", 5, tmp_path, 0)
    assert [first[:2], second[:2]] == [(record, 5) for record in result.rounds]
    assert end is result
    model = users.Residual(num_classes=3)
    model.load_state_dict(second[2])
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), result.params)
    assert torch.equal(model.norm.running_mean.double(), result.buffers[:4])
    assert not torch.equal(first[2]["head.weight"], second[2]["head.weight"]), "a copy"
    again = Recorder()
    resume(tmp_path, callbacks=[again])
    assert [told[0] if isinstance(told, tuple) else "end" for told in again.told] == ["start", "end"]
    assert again.told[0][3] == 2


class Wrong(AggregationRule):
    """Returns nonsense."""

    def __init__(self, decision: Callable[[Any], Any]) -> None:
        self.decision = decision

    def select(self, clients: Any) -> Any:
        return self.decision(clients)


class Infinite(FedAvg):
    def combine(self, global_params: Tensor, clients: Any, weights: Tensor) -> Tensor:
        return global_params / 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Wrong(lambda clients: None), "Wrong must return a Selection, it returned None"),
        (Wrong(lambda clients: Selection(clients.valid[:1])), r"must return kept of 5 clients, it returned \[1\]"),
        (Wrong(lambda clients: Selection(clients.squared_norm)), "must return kept as True or False"),
        (Wrong(lambda clients: Selection([True] * 5)), "must return kept as a tensor"),
        (Wrong(lambda clients: clients.nothing), "AttributeError: "),
    ],
)
def test_a_rule_that_returns_nonsense_is_named(rule: AggregationRule, message: str) -> None:
    with pytest.raises(PartError, match=rf"round 1, server given:Wrong: \w+: .*{message}|round 1, .*{message}"):
        simulate(users.config(), data=users.data, rule=rule)
    with pytest.raises(PartError, match=r"Infinite: ValueError: the new parameters are not \d+ finite numbers"):
        simulate(users.config(), data=users.data, rule=Infinite())


@pytest.mark.parametrize("changed", [{"model_options": {"width": 5}}, {"model": "tests.support.users:Noting"}])
def test_a_model_that_has_changed_since_the_run_began_is_said(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(PartError):
        simulate(users.config(**PATHS), tmp_path, callbacks=[users.Stop(1, partial(int, "stop"))])
    (tmp_path / "config.yaml").write_text(users.config(**{**PATHS, **changed}).to_yaml())
    with pytest.raises(ValueError, match=r"checkpoint.npz is of a model of \d+ parameters and \d+ numbers in buffers"):
        resume(tmp_path)


class Forgetful(FedAvg):
    def memory(self) -> Any:
        return {"rounds": 1}


def test_a_rule_whose_memory_is_no_bytes_is_named(tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"Forgetful: TypeError: memory\(\) must return bytes, it returned a dict"):
        simulate(users.config(), tmp_path, data=users.data, rule=Forgetful())


def test_callbacks_are_a_sequence() -> None:
    with pytest.raises(TypeError, match=r"callbacks: expected a sequence of them, got .*Told"):
        simulate(users.config(), data=users.data, callbacks=users.Told())  # type: ignore[arg-type]


def test_a_callback_that_raises_is_named_and_loses_no_finished_round(tmp_path: Path, expected: Any) -> None:
    def fail() -> None:
        raise KeyError("loss")

    with pytest.raises(PartError, match="callback Stop, on_round: KeyError: 'loss'"):
        simulate(users.config(), tmp_path, **users.EVERYTHING, callbacks=[users.Stop(2, fail)])
    assert len((tmp_path / "rounds.csv").read_text().splitlines()) == 3
    assert_same(resume(tmp_path), expected)
    with pytest.raises(TypeError, match=r"callbacks: expected objects of subclasses of fdcr_fast\.sim\.Callback"):
        simulate(users.config(), data=users.data, callbacks=[fail])  # type: ignore[list-item]


class Silent:
    """No attack."""


class Shapeless(users.Corner):
    def poison(self, images: Tensor, labels: Tensor, attacker: int, generator: torch.Generator) -> Any:
        return images[:, :1], labels


class Shorter(users.Corner):
    def update(self, known: Any) -> Tensor:
        return known.update[1:]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": lambda: nn.Flatten()}, ValueError, "the model has no parameters to train"),
        ({"model": lambda: nn.LazyLinear(3)}, ValueError, "shapes when it is made, weight, bias do not"),
        (
            {"model": lambda: nn.Linear(3, 3).double()},
            ValueError,
            "must have parameters of float32, got weight torch.f",
        ),
        ({"model": lambda: nn.Linear(5, 3)}, ValueError, r"cannot take inputs float32 \[3, 8, 8\]: RuntimeError: mat1"),
        ({"model": lambda: nn.Conv2d(3, 4, 3)}, ValueError, r"at least 3 classes, of 2 inputs .* \[2, 4, 6, 6\]"),
        ({"model": partial(users.Residual, 2)}, ValueError, r"at least 3 classes, of 2 inputs .* \[2, 2\]"),
        (
            {"model": users.Residual(3)},
            TypeError,
            "model: expected a function that returns an nn.Module, got a Residual",
        ),
        ({"model": lambda: 7}, ValueError, "returns an nn.Module, it returned a int"),
        ({"rule": "fedavg"}, TypeError, "rule: expected an AggregationRule"),
        ({"attack": Silent()}, TypeError, "attack: Silent has none of the methods poison, objective, update, fisher"),
        ({"attack": users.Corner(target=3)}, ValueError, r"attack: its target is class 3, the classes are 0\.\.2"),
        ({"attack": Shapeless()}, ValueError, r"poison of Shapeless must return images like float32 \[\d+, 3, 8, 8\]"),
        (
            {"attack": Shorter()},
            PartError,
            r"all 1 attackers failed: failed: ValueError: attack: an update must be a v",
        ),
        ({"loss": lambda output, labels: output.mean()}, ValueError, r"loss: .* returned Tensor"),
        ({"optimizer": lambda parameters, lr: None}, PartError, "all 5 clients failed: .*NoneType"),
        ({"data": users.colours(30)}, TypeError, "data: expected a FederatedData"),
        ({"data": users.data(4)}, ValueError, "clients: the data are of 4 clients, the configuration says 5"),
    ],
)
def test_bad_objects_are_named(given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        simulate(users.config(), tmp_path / "run", **{"data": users.data, **given})
    assert error is PartError or not (tmp_path / "run").exists()


def test_what_workers_cannot_import_is_named() -> None:
    with pytest.raises(ValueError, match="workers: worker processes import what is given in Python"):
        simulate(users.config(workers=2), data=users.data, model=lambda: users.Residual(3))
    with pytest.raises(ValueError, match="clients with an optimizer, buffers of their own cannot train as one batched"):
        simulate(users.config(stack=2), data=users.data, model=users.Residual, optimizer=users.nesterov)


def test_parameters_that_are_not_trained_are_not_sent() -> None:
    def frozen() -> nn.Module:
        model = users.Residual(3)
        model.stem.requires_grad_(False)
        return model

    recorder = Recorder()
    result = simulate(users.config(), data=users.data, model=frozen, rule=CoalitionFDCR(), callbacks=[recorder])
    states = [told[2] for told in recorder.told[1:-1]]
    assert torch.equal(states[0]["stem.weight"], states[-1]["stem.weight"])
    assert len(result.params) == sum(p.numel() for p in users.Residual(3).parameters()) - (3 * 9 + 1) * 4


def test_buffers_are_held_means_of_the_kept_clients() -> None:
    config = users.config(rounds=1)
    result = simulate(config, data=users.data, model=users.Residual, rule=users.DropLargest(count=1))
    kept = [record for record in result.clients if record.kept]
    assert len(kept) == 4
    trained = simulate(config, data=users.data, model=users.Residual, rule=OnlyOne(kept[0].client)).buffers
    alone = torch.stack(
        [
            simulate(config, data=users.data, model=users.Residual, rule=OnlyOne(record.client)).buffers
            for record in kept
        ]
    )
    assert torch.equal(alone[0], trained)
    weights = torch.tensor([record.weight for record in kept], dtype=torch.float64)
    ordered = alone.sort(0).values
    held = (weights @ alone).clamp(ordered[1], ordered[2])
    held[-1] = held[-1].round()
    assert torch.equal(result.buffers, held.float().double())


class OnlyOne(AggregationRule):
    def __init__(self, client: int) -> None:
        self.client = client

    def select(self, clients: Any) -> Selection:
        return Selection(torch.tensor([client == self.client for client in clients.clients]))


def test_a_client_whose_buffers_are_not_finite_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    put = RoundBuffers.put

    def poisoned(self: RoundBuffers, row: int, buffers: Tensor) -> None:
        put(self, row, buffers * torch.nan if row == 3 else buffers)

    monkeypatch.setattr(RoundBuffers, "put", poisoned)
    result = simulate(users.config(rounds=1), data=users.data, model=users.Residual)
    assert [record.reason for record in result.clients] == ["", "", "", "buffer norm.running_mean is not finite", ""]
    assert result.buffers.isfinite().all()


def test_an_attack_test_set_is_what_success_is_measured_on() -> None:
    images, _ = users.colours(30)
    wanted = torch.arange(30) % 2
    data = replace(users.data(), attack_test=(images, wanted))
    result = simulate(users.config(attack="none", rounds=1), data=data, model=users.Residual)
    recorder = Recorder()
    simulate(users.config(attack="none", rounds=1), data=data, model=users.Residual, callbacks=[recorder])
    model = users.Residual(3)
    model.load_state_dict(recorder.told[1][2])
    rate = (model.eval()(images).argmax(1) == wanted).double().mean().item()
    assert result.rounds[0].attack_success_rate == rate


def test_colluding_attacks_see_the_others() -> None:
    class Opposite:
        sees_updates = True

        def update(self, known: Any) -> Tensor:
            return -known.seen().mean.float()

    by_object = simulate(users.config(attack_rounds="all"), data=users.data, attack=Opposite())
    by_name = simulate(users.config(attack="none", attacker_update="sign-flip"), data=users.data)
    assert torch.equal(by_object.params, by_name.params)


def test_names_that_are_no_such_parts_are_errors_of_settings() -> None:
    for fields, message in (
        (
            {"model": "tests.support.users:EVERYTHING"},
            "model: expected a function that returns an nn.Module, got a dict",
        ),
        ({"attack": "torch.nn:Identity"}, "attack: Identity has none of the methods poison"),
        ({"dataset": "builtins:dict"}, "data: expected a FederatedData, or a function that returns one, got a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(users.config(**fields))


def test_rules_of_the_users_look_on() -> None:
    watch = {"tests.support.users:DropLargest": {"count": 2}, "fdcr": {}}
    result = simulate(users.config(watch=watch), data=users.data)
    kept = [record.kept for record in result.scores if record.rule == "tests.support.users:DropLargest"]
    assert (len(kept), kept.count(False)) == (3 * 5, 3 * 2)
