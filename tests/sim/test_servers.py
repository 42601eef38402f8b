from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fdcr_fast import (
    CRFL,
    FDCR,
    RLR,
    Bulyan,
    CoalitionFDCR,
    DnC,
    FedAvg,
    Krum,
    ModelQuality,
    ParamGroups,
    Sageflow,
    UpdateStore,
)
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.server_options import ServerOptions
from fdcr_fast.rules.table import RULES
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.federation import build_rule
from fdcr_fast.sim.seeding import derive_seed
from fdcr_fast.sim.servers import INFORMED_BASELINES, OWN_SETTINGS, assumed_byzantine
from tests.support.tiny import tiny_config

GROUPS = ParamGroups((slice(40, 50),), (slice(0, 30),))


def uploads(clients: int = 6, num_params: int = 50) -> tuple[torch.Tensor, UpdateStore]:
    generator = torch.Generator().manual_seed(0)
    store = UpdateStore(num_params, clients)
    for client in range(clients):
        update = torch.randn(num_params, generator=generator) * (1 + client)
        assert store.put(update, torch.rand(num_params, generator=generator), 10 + client, client_id=client)
    return torch.randn(num_params, generator=generator), store


class FakeData:
    """A server's data that takes no training."""

    def refine(self, params: torch.Tensor) -> torch.Tensor:
        return params + self.update(params)

    def update(self, params: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(params)

    def evaluate(self, params: torch.Tensor) -> ModelQuality:
        return ModelQuality(0.5, params.norm().item())


def rule_of(config: SimulationConfig) -> AggregationRule:
    return build_rule(config, config.attackers(), GROUPS, FakeData())


def test_servers_know_nothing_of_the_attack() -> None:
    truth = {
        "malicious",
        "attack",
        "attacker_fisher",
        "target",
        "poison_share",
        "trigger",
        "trigger_value",
        "seed",
    }
    known = {field.name for field in dataclasses.fields(ServerOptions)}
    assert not truth & known.union(*OWN_SETTINGS.values())
    for row in RULES.values():
        (parameter,) = inspect.signature(row.rule_class.from_options, eval_str=True).parameters.values()
        assert parameter.annotation is ServerOptions, "options are all that a server is handed"
    assert not set(RULES) & set(INFORMED_BASELINES)


def watched_of(config: SimulationConfig) -> AggregationRule:
    return config.watched(GROUPS, FakeData())[config.server]


@pytest.mark.parametrize("make", [rule_of, watched_of])
@pytest.mark.parametrize("server", RULES)
def test_permuting_the_truth_changes_no_decision(
    server: str, make: Callable[[SimulationConfig], AggregationRule]
) -> None:
    """Nor anything that a rule remembers for the next round, whether it decides or looks on."""
    w, store = uploads()
    outcomes, memories = [], []
    for malicious in ((0, 1), (4, 5), (), tuple(range(6))):
        rule = make(tiny_config(clients=6, server=server, watch=server, malicious=malicious, server_samples=5))
        first = rule.aggregate(w, store)
        outcomes.append((first, rule.aggregate(first.params, store)))
        memories.append(rule.memory())
    for rounds in outcomes[1:]:
        for expected, result in zip(outcomes[0], rounds, strict=True):
            for name in ("params", "weights", "kept", "labels"):
                assert torch.equal(getattr(expected, name), getattr(result, name)), name
            assert torch.equal(expected.scores.nan_to_num(), result.scores.nan_to_num())
            assert expected.explanation == result.explanation
    assert len(set(memories)) == 1


def test_the_oracle_drops_exactly_the_attackers() -> None:
    w, store = uploads()
    config = tiny_config(clients=6, server="oracle", malicious=(0, 4))
    result = build_rule(config, config.attackers(), GROUPS).aggregate(w, store)
    assert result.kept.tolist() == [False, True, True, True, False, True]
    counts = torch.tensor([0, 11, 12, 13, 0, 15], dtype=torch.float64)
    torch.testing.assert_close(result.weights, counts / counts.sum())
    updates = store.updates.permute(1, 0, 2).reshape(6, -1)[:, :50].double()
    expected = w.double() + (counts / counts.sum()) @ updates
    assert (result.params.double() - expected).norm() < 1e-6 * expected.norm()


def test_options_reach_the_rule() -> None:
    assert build_rule(SimulationConfig(server="fedavg"), frozenset(), GROUPS) == FedAvg()
    assert build_rule(SimulationConfig(lr=0.1), frozenset(), GROUPS) == FDCR(learning_rate=0.1, groups=GROUPS)
    options = {
        "discrepancy": "l2",
        "cluster": None,
        "partition": 2,
        "rescale": False,
        "importance": False,
        "norm_bound": None,
    }
    assert build_rule(SimulationConfig(**options), frozenset(), GROUPS) == FDCR(
        learning_rate=0.01, groups=GROUPS, **options
    )
    coalition = SimulationConfig(server="coalition-fdcr", gate=True, norm_bound=7, server_options={"start": "bold"})
    assert build_rule(coalition, frozenset(), GROUPS) == CoalitionFDCR(
        groups=GROUPS, start="bold", gate=True, norm_bound=7
    )
    assert rule_of(SimulationConfig(server="norm-clipping")) == FedAvg(clip="median")
    assert rule_of(SimulationConfig(server="krum")) == Krum(num_byzantine=3)
    assert rule_of(SimulationConfig(server="krum", num_byzantine=1)) == Krum(num_byzantine=1)
    assert rule_of(SimulationConfig(server="bulyan")) == Bulyan(num_byzantine=1), "3 would need 15 clients"
    assert rule_of(SimulationConfig(server="rlr")) == RLR(threshold=4)
    seed = derive_seed(5, "server noise")
    assert rule_of(SimulationConfig(server="dnc", seed=5)) == DnC(num_byzantine=3, seed=seed)


def test_rules_that_look_on_are_made_as_servers_are() -> None:
    config = SimulationConfig(lr=0.1, discrepancy="l2", watch="{fdcr: {cluster: kmeans}, krum, coalition-fdcr}")
    assert config.watched(GROUPS) == {
        "fdcr": FDCR(learning_rate=0.1, discrepancy="l2", cluster="kmeans", groups=GROUPS),
        "krum": Krum(num_byzantine=3),
        "coalition-fdcr": CoalitionFDCR(groups=GROUPS),
    }
    parameters = inspect.signature(SimulationConfig.watched).parameters
    assert list(parameters) == ["self", "groups", "data"], "nothing tells them who is malicious"


@pytest.mark.parametrize(("clients", "expected"), [(1, 0), (3, 0), (10, 3), (20, 6), (100, 30)])
def test_three_in_ten_are_assumed_to_be_byzantine(clients: int, expected: int) -> None:
    assert assumed_byzantine("rlr", clients, None) == expected
    assert assumed_byzantine("trimmed-mean", clients, None) == expected
    assert assumed_byzantine("fedavg", clients, clients) == clients, "a rule that assumes nothing takes anything"


def test_rules_say_what_they_need_of_a_server() -> None:
    assert {server for server in RULES if assumed_byzantine(server, 4, None) < assumed_byzantine("rlr", 4, None)} == {
        "krum",
        "multi-krum",
        "bulyan",
    }
    needing = {server for server, row in RULES.items() if row.rule_class.needs_server_data}
    assert needing == {"fltrust", "finetuning", "sageflow"}
    for server in RULES:
        config = SimulationConfig(server=server, server_samples=5)
        needs_data = pytest.raises(ValueError, match="needs data") if server in needing else nullcontext()
        with needs_data:
            build_rule(config, frozenset(), GROUPS)


def test_all_options_of_a_rule_can_be_set_and_go_before_other_settings() -> None:
    options: dict[str, Any] = {"cluster": "dbscan", "eps": 0.25, "min_samples": 3, "max_weight_share": 0.4}
    assert rule_of(SimulationConfig(cluster="kmeans", min_samples=7, server_options=options)) == FDCR(
        learning_rate=0.01, groups=GROUPS, **options
    )
    head = SimulationConfig(discrepancy="cosine", server_options="{parameters: head}")
    assert rule_of(head) == FDCR(learning_rate=0.01, discrepancy="cosine", parameters="head", groups=GROUPS)
    clipped = SimulationConfig(server="norm-clipping", server_options={"clip": 2.5, "norm_bound": 50})
    assert rule_of(clipped) == FedAvg(clip=2.5, norm_bound=50)
    assert rule_of(SimulationConfig(server="krum", server_options={"num_byzantine": 0.2})) == Krum(num_byzantine=0.2)
    noisy = SimulationConfig(server="crfl", server_options="{noise: 0.5, seed: 4}")
    assert rule_of(noisy) == CRFL(noise=0.5, seed=4)
    unsure = rule_of(SimulationConfig(server="sageflow", server_samples=5, server_options={"entropy_threshold": 2}))
    assert isinstance(unsure, Sageflow)
    assert unsure.entropy_threshold == 2
