"""Attacks in the federation: who sends what, and when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.sim import SimulationConfig, simulate
from fdcr_fast.sim.attacks.fishers import ATTACKER_FISHERS
from fdcr_fast.sim.attacks.poison import ATTACKS
from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.servers import OWN_SETTINGS
from tests.support.tiny import tiny_config

PAIR = {"malicious": (1, 2), "clients": 5}


@dataclasses.dataclass
class Round:
    """The uploads of one round, as arrays by client, and the models they came from."""

    federation: Federation
    work: LocalWork
    order: list[int]
    updates: dict[int, np.ndarray]
    fishers: dict[int, np.ndarray]


def play(round: int = 1, **fields: Any) -> Round:
    federation = Federation(tiny_config(**{**PAIR, **fields}))
    start = federation.initial_params
    last = torch.randn(len(start), generator=torch.Generator().manual_seed(8)) if round > 1 else None
    work = LocalWork(federation.config, federation.classifier, Stopwatch(), round, start, last)
    federation.collect(work)
    sent = list(federation.store)
    return Round(
        federation,
        work,
        [int(str(one.client)) for one in sent],
        {int(str(one.client)): one.update.double().numpy() for one in sent},
        {int(str(one.client)): one.fisher.double().numpy() for one in sent if one.fisher is not None},
    )


@pytest.fixture(scope="module")
def plain() -> Round:
    """Attackers with poisoned data who do nothing else."""
    return play()


@pytest.fixture(scope="module")
def benign() -> Round:
    """No client deviates."""
    return play(attack="none")


def needed(tmp_path: Path, attack: str) -> dict[str, Any]:
    if attack != "edge-case":
        return {}
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "edge.npz", x_train=rng.random((20, 8, 8)), x_test=rng.random((9, 8, 8)))
    return {"attack_file": tmp_path / "edge.npz"}


CHOICES = {
    "attack": ATTACKS,
    "attacker_training": ATTACKER_TRAININGS,
    "attacker_update": ATTACKER_UPDATES,
    "attacker_fisher": ATTACKER_FISHERS,
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, table in CHOICES.items() for name in table])
def test_every_name_runs_and_repeats_itself(tmp_path: Path, field: str, name: str) -> None:
    config = tiny_config(**{**PAIR, field: name, **needed(tmp_path, name)})
    first, again = simulate(config), simulate(config)
    assert torch.equal(first.params, again.params)
    assert first.clients == again.clients
    assert first.params.isfinite().all()
    assert not any(client.reason for client in first.clients if not client.malicious)
    assert all((record.attack_success_rate is None) == (name == "none") for record in first.rounds)
    plain = simulate(tiny_config(**PAIR))
    changed = plain.params.ne(first.params).any() or plain.clients != first.clients
    if name not in ("badnets", "plain", "honest", "scaled"):  # importance does not see the scale of a Fisher
        assert changed


def test_stages_combine() -> None:
    config = tiny_config(
        **PAIR,
        attack="dba",
        attacker_training="neurotoxin",
        attacker_update="norm-match",
        attacker_fisher="noisy-benign-mean",
        attack_rounds="2-",
    )
    assert simulate(config).summary.attack_success_rate is not None


def test_only_attackers_deviate(plain: Round, benign: Round) -> None:
    for client in range(5):
        same = np.array_equal(plain.updates[client], benign.updates[client])
        assert same == (client not in (1, 2)), client


def test_attackers_who_do_not_deviate_change_no_bit(benign: Round) -> None:
    """Nor does it matter for the order in which the server sees the uploads."""
    other = play(attack="none", malicious=(0, 4))
    assert benign.order == other.order == [0, 1, 2, 3, 4]
    for client in range(5):
        np.testing.assert_array_equal(benign.updates[client], other.updates[client])
        np.testing.assert_array_equal(benign.fishers[client], other.fishers[client])


def test_a_scaled_update_has_exactly_its_factor(plain: Round) -> None:
    default, eight = play(attacker_update="scale"), play(attacker_update="scale", attacker_factor=8)
    for client in (1, 2):
        np.testing.assert_array_equal(eight.updates[client], 8 * plain.updates[client])
        np.testing.assert_array_equal(default.updates[client], (plain.updates[client] * 2.5).astype(np.float32))
        np.testing.assert_array_equal(eight.fishers[client], plain.fishers[client])


def test_norms_are_matched_to_what_clean_data_give(plain: Round, benign: Round) -> None:
    matched, given = play(attacker_update="norm-match"), play(attacker_update="norm-match", attacker_norm=0.5)
    for client in (1, 2):
        norm = np.linalg.norm(benign.updates[client])
        direction = plain.updates[client] / np.linalg.norm(plain.updates[client])
        np.testing.assert_allclose(matched.updates[client], norm * direction, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(given.updates[client], 0.5 * direction, rtol=1e-5, atol=1e-9)


def test_agreement_with_the_model_is_what_clean_data_give(plain: Round, benign: Round) -> None:
    """Over the features, which of a model with two layers are the first."""
    played = play(attacker_update="add-model")
    model = plain.work.params.double().numpy().copy()
    layout = plain.federation.classifier.layout
    assert layout.names == ("1.weight", "1.bias", "3.weight", "3.bias")
    inside = np.arange(len(model)) < layout.slices["3.weight"].start

    def agreement(update: np.ndarray) -> float:
        a, b = update[inside], model[inside]
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    for client in (1, 2):
        assert agreement(played.updates[client]) == pytest.approx(agreement(benign.updates[client]), abs=1e-5)
        assert abs(agreement(plain.updates[client]) - agreement(benign.updates[client])) > 1e-3
        np.testing.assert_array_equal(played.updates[client][~inside], plain.updates[client][~inside])
        np.testing.assert_array_equal(played.fishers[client], plain.fishers[client])


def test_pgd_projects_onto_the_ball_that_clean_data_give(benign: Round) -> None:
    long = {"local_epochs": 1, "lr": 0.2}
    honest = play(attack="none", **long)
    default, small = (play(attacker_training="pgd", attacker_norm=norm, **long) for norm in (None, 0.05))
    for client in (1, 2):
        assert np.linalg.norm(default.updates[client]) <= np.linalg.norm(honest.updates[client]) * (1 + 1e-5)
        assert np.linalg.norm(small.updates[client]) == pytest.approx(0.05, rel=1e-4)


def test_neurotoxin_freezes_what_the_last_round_changed_most(plain: Round) -> None:
    first, later = (play(round, attacker_training="neurotoxin", attacker_mask=0.3) for round in (1, 2))
    np.testing.assert_array_equal(first.updates[1], plain.updates[1])
    assert later.work.last_update is not None
    magnitude = np.abs(later.work.last_update.numpy())
    frozen = magnitude > np.sort(magnitude)[::-1][round(0.3 * len(magnitude))]
    for client in (1, 2):
        assert (later.updates[client][frozen] == 0).all()
        assert np.count_nonzero(later.updates[client]) > 0.6 * len(frozen)


def test_the_last_update_is_that_of_the_global_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    collect = Federation.collect

    def spy(self: Federation, work: LocalWork, *rest: Any) -> object:
        seen.append((work.params, work.last_update))
        return collect(self, work, *rest)

    monkeypatch.setattr(Federation, "collect", spy)
    simulate(tiny_config(rounds=3))
    params, updates = zip(*seen, strict=True)
    assert updates[0] is None
    for before, after, update in zip(params, params[1:], updates[1:], strict=False):
        assert torch.equal(after - before, update)
        assert update.any()


@pytest.mark.parametrize("view", ["benign", "attackers"])
@pytest.mark.parametrize("name", ["sign-flip", "ipm", "alie"])
def test_colluding_attackers_send_last_what_they_make_of_the_updates_in_view(
    plain: Round, name: str, view: str
) -> None:
    played = play(attacker_update=name, attacker_view=view)
    assert played.order == [0, 3, 4, 1, 2]
    members = (0, 3, 4) if view == "benign" else (1, 2)
    rows = np.stack([plain.updates[client] for client in members])
    mean, std = rows.mean(0), rows.std(0, ddof=1)
    expected = {"sign-flip": -mean, "ipm": -2 * mean, "alie": mean + 1.5 * std}[name]
    for client in (1, 2):
        np.testing.assert_allclose(played.updates[client], expected, rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(played.fishers[client], plain.fishers[client])
    for client in (0, 3, 4):
        np.testing.assert_array_equal(played.updates[client], plain.updates[client])


def test_noise_differs_between_attackers_and_rounds() -> None:
    first, second = (play(round, attacker_update="gaussian", attacker_factor=0.1) for round in (1, 2))
    noises = [played.updates[client] for played in (first, second) for client in (1, 2)]
    assert all(noise.std() == pytest.approx(0.1, rel=0.1) for noise in noises)
    correlations = np.corrcoef(noises) - np.eye(4)
    assert np.abs(correlations).max() < 6 / np.sqrt(len(noises[0]))


def test_which_fisher_is_uploaded(plain: Round, benign: Round) -> None:
    found = {name: play(attacker_fisher=name) for name in ATTACKER_FISHERS}
    classifier = plain.federation.classifier
    for client in (1, 2):
        model = plain.work.params + torch.from_numpy(plain.updates[client]).float()
        own = plain.federation.data[client]
        clean = classifier.fisher(model, own.images, own.labels, own.indices).double().numpy()
        mean = np.mean([plain.fishers[other] for other in (0, 3, 4)], axis=0)
        expected = {
            "honest": plain.fishers[client],
            "clean": clean,
            "benign-model": benign.fishers[client],
            "benign-mean": mean,
            "scaled": 10 * plain.fishers[client],
            "constant": np.ones_like(clean),
        }
        for name, fisher in expected.items():
            np.testing.assert_allclose(found[name].fishers[client], fisher, rtol=1e-4, atol=1e-9, err_msg=name)
        assert not np.allclose(plain.fishers[client], clean, rtol=1e-2)
        noisy = found["noisy-benign-mean"].fishers[client]
        some = mean > 0
        assert np.std(np.log(noisy[some] / mean[some])) == pytest.approx(0.1, rel=0.1)
    assert not np.array_equal(*(found["noisy-benign-mean"].fishers[client] for client in (1, 2)))
    assert not np.array_equal(*(found["random"].fishers[client] for client in (1, 2)))
    for name, played in found.items():
        assert played.order == ([0, 3, 4, 1, 2] if "mean" in name else [0, 1, 2, 3, 4]), name
        for client in range(5):
            np.testing.assert_array_equal(played.updates[client], plain.updates[client], err_msg=name)


def test_attackers_who_pause_are_benign_meanwhile() -> None:
    fields = {**PAIR, "server": "fedavg", "rounds": 4}
    paused = simulate(tiny_config(**fields, attack_rounds="3", attacker_update="scale"))
    benign = simulate(tiny_config(**fields, attack="none"))
    assert [record.true_positive_rate is None for record in paused.rounds] == [True, True, False, True]
    assert [record.accuracy for record in paused.rounds[:2]] == [record.accuracy for record in benign.rounds[:2]]
    always = simulate(tiny_config(**fields, attack_rounds="1-4", attacker_update="scale"))
    assert torch.equal(always.params, simulate(tiny_config(**fields, attacker_update="scale")).params)
    for round, deviates in ((2, False), (3, True)):
        sent = play(round, attack_rounds="3", attacker_update="alie", rounds=3)
        honest = play(round, attack="none")
        assert sent.order == ([0, 3, 4, 1, 2] if deviates else [0, 1, 2, 3, 4])
        assert np.array_equal(sent.updates[1], honest.updates[1]) != deviates
        assert np.array_equal(sent.fishers[1], honest.fishers[1]) != deviates


def test_attackers_with_nobody_left_to_observe_do_not_end_the_run() -> None:
    result = simulate(tiny_config(lr=1e30, rounds=1, attacker_update="alie", attacker_fisher="benign-mean"))
    assert all(client.reason for client in result.clients)


def test_the_success_of_label_flipping_is_counted_on_the_source_class() -> None:
    config = tiny_config(attack="label-flip", source=7, target=1, poison_share=1.0, local_epochs=8, malicious=(0, 1, 2))
    federation = Federation(config)
    params, record, _ = federation.run_round(1, federation.initial_params, None)
    federation.classifier.load(params)
    hits = sources = 0
    for image, label in zip(federation.evaluate.images, federation.evaluate.labels.tolist(), strict=True):
        if label == 7:
            sources += 1
            hits += federation.classifier.model(image[None]).argmax().item() == 1
    assert record.attack_success_rate == pytest.approx(hits / sources)
    assert hits > 0


def test_untargeted_attacks_cost_accuracy() -> None:
    fields: dict[str, Any] = {
        "max_train_samples": None,
        "clients": 5,
        "malicious": (0, 1),
        "rounds": 4,
        "attack": "none",
    }
    accuracy = {
        name: simulate(tiny_config(server="fedavg", **fields, attacker_update=name)).summary.accuracy
        for name in ("plain", "ipm", "gaussian")
    }
    assert accuracy["plain"] > 1.5 * max(accuracy["ipm"], accuracy["gaussian"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attack": "edge-case"}, "attack_file: edge-case needs a file"),
        ({"attack": "edge-case", "attack_file": "nowhere.npz"}, "attack_file: no file .*nowhere.npz"),
        ({"attack": "label-flip", "source": 2}, "source: label-flip needs a class other than the target"),
        ({"attack": "label-flip", "source": 10}, "source: class 10"),
        ({"attack": "dba", "trigger": "0:8"}, "outside the 8x8 image"),
    ],
)
def test_attacks_that_do_not_fit_fail_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        simulate(tiny_config(**fields), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_settings_of_attacks_that_are_not_chosen_are_harmless() -> None:
    Federation(
        tiny_config(
            attack="none",
            target=99,
            source=99,
            trigger="99:99",
            attack_file="nowhere.npz",
            attacker_mask=0,
            attacker_norm=1,
            attacker_factor=3,
            attacker_view="attackers",
            attacker_fisher_factor=2,
        )
    )


def test_servers_are_told_nothing_of_the_attack() -> None:
    told = {field.name for field in dataclasses.fields(ServerOptions)}.union(*OWN_SETTINGS.values())
    settings = set(SimulationConfig.model_fields)
    attack = {name for name in settings if name.startswith("attack")} | {"malicious", "source", "blend_alpha"}
    assert not told & attack
