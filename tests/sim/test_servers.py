from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from tiny import tiny_config

from fdcr_fast import FDCR, CoalitionFDCR, FedAvg, ParamGroups, UpdateStore
from fdcr_fast.sim.config import SimulationConfig
from fdcr_fast.sim.federation import build_rule
from fdcr_fast.sim.servers import INFORMED_BASELINES, SERVERS, ServerOptions

GROUPS = ParamGroups((slice(40, 50),), (slice(0, 30),))


def uploads(clients: int = 6, num_params: int = 50) -> tuple[torch.Tensor, UpdateStore]:
    generator = torch.Generator().manual_seed(0)
    store = UpdateStore(num_params, clients)
    for client in range(clients):
        update = torch.randn(num_params, generator=generator) * (1 + client)
        assert store.put(update, torch.rand(num_params, generator=generator), 10 + client, client_id=client)
    return torch.randn(num_params, generator=generator), store


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
    w, store = uploads()
    outcomes = []
    for malicious in ((0, 1), (4, 5), (), tuple(range(6))):
        config = tiny_config(clients=6, server=server, malicious=malicious)
        outcomes.append(build_rule(config, config.attackers(), GROUPS).aggregate(w, store))
    for other in outcomes[1:]:
        for name in ("params", "weights", "kept", "labels"):
            assert torch.equal(getattr(outcomes[0], name), getattr(other, name)), name


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
