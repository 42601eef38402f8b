from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fdcr_fast.sim import ClientRecord, ProgressEvent, RoundRecord, SimulationConfig, simulate
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.datasets.readers import load_dataset
from fdcr_fast.sim.run.federation import Federation
from tests.support.tiny import tiny_config, without_costs, write_npz


@pytest.mark.parametrize("server", ["fedavg", "fdcr", "oracle"])
def test_same_seed_same_bits(server: str) -> None:
    first, again = (simulate(tiny_config(server=server, attacker_fisher="random")) for _ in range(2))
    torch.manual_seed(99)
    assert torch.equal(first.params, again.params)
    assert torch.equal(first.similarity, again.similarity)
    assert without_costs(first) == without_costs(again)
    assert first.clients == again.clients
    other = simulate(tiny_config(server=server, seed=1))
    assert not torch.equal(first.params, other.params)


def work_of(federation: Federation, round: int = 1) -> LocalWork:
    return LocalWork(federation.config, federation.classifier, Stopwatch(), round, federation.initial_params, None)


def uploads(config: SimulationConfig, round: int = 1) -> dict[object, tuple[torch.Tensor, torch.Tensor]]:
    """Updates and Fishers by client."""
    federation = Federation(config)
    federation.collect(work_of(federation, round))
    return {sent.client: (sent.update, sent.fisher) for sent in federation.store if sent.fisher is not None}


def test_clients_do_not_depend_on_their_order() -> None:
    federation = Federation(tiny_config())
    work = work_of(federation)
    forward, backward = (
        {client: work.train(client, federation.data[client]) for client in order} for order in ([0, 1, 2], [2, 1, 0])
    )
    assert all(torch.equal(forward[client], backward[client]) for client in range(3))


def test_only_malicious_clients_forge_their_fisher() -> None:
    honest, forged = (uploads(tiny_config(attacker_fisher=kind)) for kind in ("honest", "random"))
    assert all(torch.equal(honest[client][0], forged[client][0]) for client in range(4))
    same = [torch.equal(honest[client][1], forged[client][1]) for client in range(4)]
    assert same == [True, False, True, True]


def test_rounds_draw_anew() -> None:
    first, second = (uploads(tiny_config(attacker_fisher="random"), round)[1] for round in (1, 2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_round_of_fedavg_is_the_weighted_mean_of_local_models() -> None:
    config = tiny_config(server="fedavg", rounds=1, malicious=0)
    federation = Federation(config)
    total = torch.zeros_like(federation.initial_params, dtype=torch.float64)
    for client, data in enumerate(federation.data):
        total += len(data.indices) * work_of(federation).train(client, data).double()
    expected = total / sum(len(data.indices) for data in federation.data)
    params = simulate(config).params
    assert (params.double() - expected).norm() < 1e-6 * expected.norm()


def test_figures_are_what_a_naive_count_gives() -> None:
    config = tiny_config(max_test_samples=60, local_epochs=8)
    federation = Federation(config)
    params, record, clients = federation.run_round(1, federation.initial_params, None)
    assert 0 < record.accuracy < 1
    assert record.attack_success_rate not in (0, 1)
    federation.classifier.load(params)
    correct = hits = others = 0
    for image, label in zip(federation.evaluate.images, federation.evaluate.labels.tolist(), strict=True):
        correct += federation.classifier.model(image[None]).argmax().item() == label
        if label != 2:
            others += 1
            stamped = image.clone()
            for row in (0, 2):
                for column in (0, 1, 2, 4, 5, 6):
                    stamped[0, row, column] = 1.0
            hits += federation.classifier.model(stamped[None]).argmax().item() == 2
    assert record.accuracy == pytest.approx(correct / 60)
    assert record.attack_success_rate == pytest.approx(hits / others)
    assert record.backdoor_failure_rate == pytest.approx(1 - hits / others)
    assert record.tradeoff == pytest.approx((correct / 60 + 1 - hits / others) / 2)
    assert [client.client for client in clients if client.malicious] == [1]
    assert [client.num_samples for client in clients] == [len(data.indices) for data in federation.data]
    dropped = [client.client for client in clients if not client.kept]
    assert record.true_positive_rate == float(1 in dropped)
    assert record.false_positive_rate == pytest.approx(len(set(dropped) - {1}) / 3)
    assert record.kept == 4 - len(dropped)
    assert sum(client.weight for client in clients) == pytest.approx(1)


def test_only_malicious_clients_are_poisoned() -> None:
    config = tiny_config(malicious=(1, 3), poison_share=1.0, target=4)
    federation = Federation(config)
    clean = load_dataset("digits").subset(240, 100, seed=0)
    for client, data in enumerate(federation.data):
        assert torch.equal(data.images, clean.train_images)
        assert torch.equal(data.labels, clean.train_labels)
        if client in (1, 3):
            poisoned = federation.attackers.poisoned(client)
            assert (poisoned.labels[poisoned.indices] == 4).all()
            stamped = clean.train_images[data.indices].clone()
            stamped[:, :, [[0], [2]], [0, 1, 2, 4, 5, 6]] = 1.0
            assert torch.equal(poisoned.images[poisoned.indices], stamped)
    assert federation.attackers.clients == {1, 3}
    assert torch.equal(federation.evaluate.images, clean.test_images)


def test_rates_without_a_population_are_undefined() -> None:
    nobody = simulate(tiny_config(malicious=0, server="oracle", rounds=1)).summary
    assert (nobody.true_positive_rate, nobody.false_positive_rate, nobody.exclusion_rate) == (None, None, 0)
    everybody = simulate(tiny_config(malicious="0,1,2,3", server="oracle", rounds=1))
    assert (everybody.summary.true_positive_rate, everybody.summary.false_positive_rate) == (1, None)
    start = Federation(everybody.config).initial_params
    assert torch.equal(everybody.params, start), "nobody left: the model stays"


def test_success_is_undefined_without_images_of_other_classes(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "data.npz", y_test=[1] * 20)
    config = SimulationConfig(
        dataset=str(path), target=1, clients=2, rounds=1, local_epochs=1, model="mlp", malicious="0,"
    )
    summary = simulate(config).summary
    assert (summary.attack_success_rate, summary.backdoor_failure_rate, summary.tradeoff) == (
        None,
        None,
        None,
    )


def test_the_attack_succeeds_under_fedavg_and_not_under_the_oracle() -> None:
    settings = {"max_train_samples": None, "clients": 10, "malicious": 0.3, "rounds": 8, "local_epochs": 5}
    undefended = simulate(tiny_config(server="fedavg", **settings)).summary
    oracle = simulate(tiny_config(server="oracle", **settings)).summary
    assert undefended.attack_success_rate is not None
    assert oracle.attack_success_rate is not None
    assert undefended.attack_success_rate > 0.5 > 0.2 > oracle.attack_success_rate
    assert min(undefended.accuracy, oracle.accuracy) > 0.8


def test_diverged_clients_are_recorded_and_the_run_goes_on() -> None:
    result = simulate(tiny_config(lr=1e30, rounds=1))
    assert {client.client for client in result.clients if client.reason} == {0, 1, 2, 3}
    assert all("finite" in client.reason for client in result.clients)
    assert result.summary.rejected == 4
    assert torch.equal(result.params, Federation(result.config).initial_params)


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    result = simulate(tiny_config(rounds=3), tmp_path / "run", events.append)
    assert [(event.round, event.clients_done) for event in events[:5]] == [(1, n) for n in (1, 2, 3, 4, 4)]
    assert [event.record for event in events if event.record] == list(result.rounds)

    folder = tmp_path / "run"
    assert SimulationConfig.from_yaml((folder / "config.yaml").read_text()) == result.config
    with (folder / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [RoundRecord.model_validate(row) for row in rows] == list(result.rounds)
    with (folder / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [ClientRecord.model_validate(row) for row in rows] == list(result.clients)
    assert len(rows) == 12
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(result.summary.model_dump_json())
    assert {
        "accuracy",
        "attack_success_rate",
        "backdoor_failure_rate",
        "tradeoff",
        "true_positive_rate",
        "false_positive_rate",
        "exclusion_rate",
        "problems",
        "seconds",
        "phase_seconds",
        "peak_rss_bytes",
    } <= set(summary)
    assert set(summary["phase_seconds"]) == {"training", "fisher", "aggregation", "evaluation"}
    assert min(summary["phase_seconds"].values()) > 0
    assert summary["peak_rss_bytes"] > 10 * 2**20
    for name in ("accuracy", "clients", "similarity"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="already holds a run"):
        simulate(result.config, folder)


def test_configurations_that_do_not_fit_the_data_fail_before_anything_is_written(tmp_path: Path) -> None:
    for fields, message in (
        ({"target": 10}, "class 10"),
        ({"trigger": "0:8"}, "outside the 8x8 image"),
        ({"model": "cnn"}, "16x16"),
        ({"clients": 100}, "100 clients"),
        ({"dataset": "mnist"}, "--data-dir"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            simulate(tiny_config(**fields), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    simulate(tiny_config(threads=before + 1, rounds=1), progress=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
