from __future__ import annotations

import dataclasses
import inspect
from contextlib import nullcontext
from typing import cast

import pytest
import torch

from fdcr_fast import FDCR, RLR, Bulyan, CoalitionFDCR, DnC, FedAvg, Krum, ModelQuality, ParamGroups, UpdateStore
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.run.federation import build_rule
from fdcr_fast.sim.seeding import derive_seed
from fdcr_fast.sim.server_data import ServerData
from fdcr_fast.sim.servers import BYZANTINE, INFORMED_BASELINES, NEED_DATA, SERVERS, ServerOptions, assumed_byzantine
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
    return build_rule(config, config.attackers(), GROUPS, cast(ServerData, FakeData()))


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
    assert not truth & {field.name for field in dataclasses.fields(ServerOptions)}
    for build in SERVERS.values():
        (parameter,) = inspect.signature(build, eval_str=True).parameters.values()
        assert parameter.annotation is ServerOptions, "options are all that a server is handed"
    assert not set(SERVERS) & set(INFORMED_BASELINES)


@pytest.mark.parametrize("server", SERVERS)
def test_permuting_the_truth_changes_no_decision(server: str) -> None:
    """Nor anything that a rule remembers for the next round."""
    w, store = uploads()
    outcomes, memories = [], []
    for malicious in ((0, 1), (4, 5), (), tuple(range(6))):
        rule = rule_of(tiny_config(clients=6, server=server, malicious=malicious, server_samples=5))
        first = rule.aggregate(w, store)
        outcomes.append((first, rule.aggregate(first.params, store)))
        memories.append(rule.memory())
    for rounds in outcomes[1:]:
        for expected, result in zip(outcomes[0], rounds, strict=True):
            for name in ("params", "weights", "kept", "labels"):
                assert torch.equal(getattr(expected, name), getattr(result, name)), name
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
    assert build_rule(SimulationConfig(lr=0.1), frozenset(), GROUPS) == FDCR(learning_rate=0.1)
    options = {
        "discrepancy": "l2",
        "cluster": None,
        "partition": 2,
        "rescale": False,
        "importance": False,
        "norm_bound": None,
    }
    assert build_rule(SimulationConfig(**options), frozenset(), GROUPS) == FDCR(learning_rate=0.01, **options)
    coalition = SimulationConfig(server="coalition-fdcr", gate=True, norm_bound=7)
    assert build_rule(coalition, frozenset(), GROUPS) == CoalitionFDCR(groups=GROUPS, gate=True, norm_bound=7)
    assert rule_of(SimulationConfig(server="norm-clipping")) == FedAvg(clip="median")
    assert rule_of(SimulationConfig(server="krum")) == Krum(num_byzantine=3)
    assert rule_of(SimulationConfig(server="krum", num_byzantine=1)) == Krum(num_byzantine=1)
    assert rule_of(SimulationConfig(server="bulyan")) == Bulyan(num_byzantine=1), "3 would need 15 clients"
    assert rule_of(SimulationConfig(server="rlr")) == RLR(threshold=4)
    seed = derive_seed(5, "server noise")
    assert rule_of(SimulationConfig(server="dnc", seed=5)) == DnC(num_byzantine=3, seed=seed)


@pytest.mark.parametrize(("clients", "expected"), [(1, 0), (3, 0), (10, 3), (20, 6), (100, 30)])
def test_three_in_ten_are_assumed_to_be_byzantine(clients: int, expected: int) -> None:
    assert assumed_byzantine("rlr", clients, None) == expected
    assert assumed_byzantine("trimmed-mean", clients, None) == expected
    assert assumed_byzantine("fedavg", clients, clients) == clients, "a rule that assumes nothing takes anything"


def test_tables_name_servers() -> None:
    assert set(BYZANTINE) | NEED_DATA <= set(SERVERS)
    for server in SERVERS:
        config = SimulationConfig(server=server, server_samples=5)
        needs_data = pytest.raises(ValueError, match="needs data") if server in NEED_DATA else nullcontext()
        with needs_data:
            build_rule(config, frozenset(), GROUPS)
