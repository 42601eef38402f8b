from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fdcr_fast.sim import SimulationConfig
from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_defaults_are_the_papers_setting() -> None:
    config = SimulationConfig()
    expected = {
        "dataset": "digits",
        "clients": 10,
        "beta": 0.5,
        "malicious": 0.3,
        "attack": "badnets",
        "attack_rounds": "all",
        "attacker_training": "plain",
        "attacker_update": "plain",
        "attacker_fisher": "honest",
        "target": 2,
        "poison_share": 0.5,
        "trigger": PAPER_TRIGGER,
        "server": "fdcr",
        "discrepancy": "mse",
        "cluster": "finch",
        "partition": "first",
        "rounds": 50,
        "local_epochs": 10,
        "batch_size": 64,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-5,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    with pytest.raises(ValidationError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "imagenet"}, "expected one of digits, .* or a file FILE.npz"),
        (
            {"colour": 1, "datset": "digits"},
            r"unknown setting 'colour'.*\n.*unknown setting 'datset'; did you mean 'dataset'\?",
        ),
        ({"dataset": "CIFAR-10"}, r"or a file FILE.npz; did you mean 'cifar10'\?"),
        ({"attack": "bad-nets"}, r"label-flip; did you mean 'badnets'\?"),
        ({"server": "FDCR"}, r"oracle; did you mean 'fdcr'\?"),
        ({"clients": 0}, "clients"),
        ({"clients": 3, "malicious": "1,3"}, r"no clients \[3\], the clients are 0\.\.2"),
        ({"malicious": "1,1"}, "twice"),
        ({"malicious": "1,x"}, "integer"),
        ({"malicious": "-1,"}, "greater than or equal to 0"),
        ({"malicious": "2"}, "'2,' is client 2 alone"),
        ({"malicious": 1.0}, "below 1"),
        ({"malicious": -0.1}, "at least 0"),
        ({"malicious": "some"}, "number"),
        ({"attack": "trojan"}, "attack\n.*expected one of none, badnets, blended, dba, edge-case, label-flip"),
        ({"attacker_training": "slow"}, "expected one of plain, constrain-l2, constrain-cosine, pgd, neurotoxin"),
        (
            {"attacker_update": "huge"},
            "expected one of plain, scale, norm-match, add-model, sign-flip, gaussian, alie, ipm",
        ),
        ({"attacker_fisher": "true"}, "expected one of honest, random, clean, benign-model, benign-mean"),
        ({"attacker_view": "all"}, "attacker_view\n.*'benign' or 'attackers'"),
        ({"attacker_factor": 0}, "attacker_factor"),
        ({"attacker_norm": "big"}, "attacker_norm"),
        ({"attacker_alpha": 1.5}, "attacker_alpha"),
        ({"attacker_mask": 1}, "attacker_mask"),
        ({"blend_alpha": 0}, "blend_alpha"),
        ({"attack_rounds": "late"}, "attack_rounds\n.*expected 'all' or rounds such as 5.* got 'late'"),
        ({"attack_rounds": "9-5"}, "attack_rounds"),
        ({"attack_rounds": "60-"}, r"attack_rounds: 60- holds none of the rounds 1\.\.50"),
        ({"malicious": 0, "attacker_training": "pgd"}, "malicious: attacker_training pgd needs at least one malicious"),
        ({"malicious": 0.04, "attacker_update": "alie"}, "malicious: attacker_update alie needs at least one"),
        ({"malicious": 0, "attacker_fisher": "random"}, "malicious: attacker_fisher random needs at least one"),
        (
            {"malicious": "0,1", "clients": 2, "attacker_update": "ipm"},
            "malicious: attacker_update ipm needs a benign client to observe, all 2 are malicious",
        ),
        ({"malicious": "0,1", "clients": 2, "attacker_fisher": "benign-mean"}, "needs a benign client to observe"),
        ({"server": "zeno"}, "expected one of fedavg, fdcr, coalition-fdcr, .*, oracle"),
        ({"server": "fltrust"}, "server: fltrust needs data of the server: set server_samples"),
        ({"server": "krum", "num_byzantine": 4}, "krum with num_byzantine=4 needs at least 11 clients, got 10"),
        ({"server": "bulyan", "clients": 2}, "bulyan with num_byzantine=0 needs at least 3 clients, got 2"),
        ({"server": "krum", "num_byzantine": -1}, "num_byzantine"),
        ({"server_options": {"ep": 0.3}}, r"unknown option of fdcr 'ep'; did you mean 'eps'\?"),
        ({"server": "oracle", "server_options": {"attackers": []}}, "unknown option of oracle 'attackers'"),
        ({"server_options": {"eps": "wide"}}, "server: eps of FDCR must be a real number, got 'wide'"),
        ({"server_options": {"eps": -1}}, "server: eps must be positive"),
        ({"server_options": "eps=0.3"}, "server_options\n.*valid dictionary"),
        ({"server_options": "{eps"}, "server_options\n.*expected a mapping such as {eps: 0.3, min_samples: 3}"),
        ({"server_options": {1: 2}}, "server_options"),
        ({"server_samples": -1}, "server_samples"),
        ({"model": "resnet"}, "expected one of auto, cnn, mlp"),
        ({"split": "iid"}, "expected one of dirichlet, writer"),
        ({"cluster": "gmm"}, "cluster"),
        ({"discrepancy": "l1"}, "discrepancy"),
        ({"partition": "-1"}, "partition"),
        ({"norm_bound": 0}, "norm_bound"),
        ({"beta": 0}, "beta"),
        ({"lr": "nan"}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"momentum": 1}, "momentum"),
        ({"rounds": 2.5}, "rounds"),
        ({"poison_share": 1.1}, "poison_share"),
        ({"watch": "fdrc"}, "unknown rule to watch 'fdrc'; did you mean 'fdcr'"),
        ({"watch": "oracle"}, "unknown rule to watch 'oracle'"),
        ({"watch": "{fdcr: {esp: 1}}"}, "unknown option of fdcr 'esp'; did you mean 'eps'"),
        ({"watch": "{fdcr: {eps: x}}"}, "watch: eps of FDCR must be a real number"),
        ({"watch": "fltrust"}, "watch: fltrust needs data of the server"),
        ({"trigger": "1:2:3"}, "row:column"),
        ({"trigger": "1:x"}, "integer"),
        ({"trigger": []}, "at least one pixel"),
        ({"trigger": [[-1, 0]]}, "counted from 0"),
        ({"trigger_value": 2}, "trigger_value"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SimulationConfig(**fields)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0,3,7", {0, 3, 7}), ("2,", {2}), ([4, 5], {4, 5}), ("0", set()), (0, set()), ("0,", {0})],
)
def test_listed_attackers(value: Any, expected: set[int]) -> None:
    assert SimulationConfig(malicious=value).attackers() == expected


@pytest.mark.parametrize(("share", "clients", "count"), [("0.3", 10, 3), (0.25, 10, 2), (0.5, 9, 4), (0.9, 1, 1)])
def test_a_share_of_attackers_is_drawn_by_seed(share: Any, clients: int, count: int) -> None:
    draws = {
        SimulationConfig(malicious=share, clients=clients, seed=seed).attackers() for seed in range(10) for _ in "ab"
    }
    assert {len(draw) for draw in draws} == {count}
    assert all(draw <= set(range(clients)) for draw in draws)
    assert len(draws) > 1 or clients == 1


@pytest.mark.parametrize(
    ("value", "expected"), [("5-,2", "5-,2"), (7, "7"), (["1-3", 9], "1-3,9"), ("1-/2", "1-/2"), ("all", "all")]
)
def test_attack_rounds_may_be_numbers_and_lists(value: Any, expected: str) -> None:
    assert SimulationConfig(attack_rounds=value).attack_rounds == expected


def test_attackers_may_observe_each_other_where_nobody_is_benign() -> None:
    config = SimulationConfig(malicious="0,1", clients=2, attacker_update="alie", attacker_view="attackers")
    assert not config.observes_benign()


def test_yaml_round_trip() -> None:
    config = SimulationConfig(
        dataset="some.npz",
        data_dir="/data",
        malicious="1,4",
        trigger="0:1,2:3",
        cluster="none",
        norm_bound="none",
        partition="1",
        rescale=False,
        attack_file="edge.npz",
        attack_rounds=["2-", 1],
        attacker_factor="auto",
        attacker_norm=2,
        server_options="{eps: 0.3}",
        watch="{coalition-fdcr: {decay: 0.5}, flame}",
    )
    assert config.attack_file is not None
    assert config.attack_file.is_absolute()
    assert (config.attacker_factor, config.attacker_norm) == (None, 2.0)
    assert Path(config.dataset).is_absolute()
    assert config.trigger == ((0, 1), (2, 3))
    assert (config.cluster, config.norm_bound, config.partition) == (None, None, 1)
    assert config.server_options == {"eps": 0.3}
    assert config.watch == {"coalition-fdcr": {"decay": 0.5}, "flame": {}}
    assert SimulationConfig(watch="coalition-fdcr, flame").watch == {"coalition-fdcr": {}, "flame": {}}
    assert SimulationConfig.from_yaml(config.to_yaml()) == config
    assert SimulationConfig.from_yaml(SimulationConfig().to_yaml()) == SimulationConfig()


def test_configurations_are_values_that_can_be_looked_up() -> None:
    options = [{"eps": 1, "min_samples": 3}, {"min_samples": 3, "eps": 1.0}, {"eps": 2}, {}]
    one, same, *others = (SimulationConfig(server_options=given) for given in options)
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, *others, SimulationConfig(), SimulationConfig(seed=1)}) == 4
    watched = [SimulationConfig(watch=given) for given in ("fdcr", ["fdcr"], {"fdcr": {"eps": 2}}, "krum")]
    assert hash(watched[0]) == hash(watched[1])
    assert len({*watched, SimulationConfig()}) == 4


def test_overrides_win_over_yaml() -> None:
    config = SimulationConfig.from_yaml("rounds: 3\nlr: 0.5\n", {"lr": "0.1"})
    assert (config.rounds, config.lr) == (3, 0.1)
    assert SimulationConfig.from_yaml("") == SimulationConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("round: 3", r"unknown setting 'round'; did you mean 'rounds'\?"),
        ("local-epochs: 3", r"unknown setting 'local-epochs'; did you mean 'local_epochs'\?"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_bad_yaml_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationConfig.from_yaml(text)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    SimulationConfig.from_yaml(path.read_text())
