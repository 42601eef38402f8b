"""Who takes part, who sends nothing, and what servers and records make of it."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fdcr_fast.sim import ProgressEvent, SimulationConfig, resume, simulate
from fdcr_fast.sim.clients.participation import DROPPED_OUT, MISSED_DEADLINE, draw_participants
from fdcr_fast.sim.clients.population import Job, Population, Upload
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.run.federation import Federation
from fdcr_fast.sim.run.figures import clients_figure, similarity_figure
from tests.support.tiny import tiny_config, without_costs

CROWD: dict[str, Any] = {"clients": 12, "min_samples": 5, "malicious": (1, 5, 8), "participants": 6, "rounds": 3}


def test_everybody_is_drawn_as_often() -> None:
    config = SimulationConfig(clients=40, participants=0.25)
    drawn = [draw_participants(config, round) for round in range(1, 401)]
    assert all(len(set(one.clients)) == 10 and list(one.clients) == sorted(one.clients) for one in drawn)
    assert all(one.epochs == dict.fromkeys(one.clients, 10) and not one.missing for one in drawn)
    counts = Counter(client for one in drawn for client in one.clients)
    assert set(counts) == set(range(40))
    assert all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert drawn == [draw_participants(config, round) for round in range(1, 401)]
    assert drawn[0] != draw_participants(config.model_copy(update={"seed": 1}), 1)
    assert drawn[0] != drawn[1]


def test_drawing_takes_no_time_for_those_who_are_not_drawn() -> None:
    config = SimulationConfig(clients=10**15, participants=3, malicious=(7,), dropout=0.5)
    assert len(draw_participants(config, 1).clients) == 3


def test_dropouts_and_stragglers_are_as_frequent_as_configured() -> None:
    config = SimulationConfig(clients=4000, malicious=0, dropout=0.3, stragglers=0.5, local_epochs=4)
    drawn = draw_participants(config, 1)
    assert set(drawn.epochs) | set(drawn.missing) == set(drawn.clients) == set(range(4000))
    assert not set(drawn.epochs) & set(drawn.missing)
    found = Counter(drawn.missing.values()) + Counter(map(str, drawn.epochs.values()))
    late = 0.7 * 0.5 / 4
    expected = {DROPPED_OUT: 0.3, MISSED_DEADLINE: late, "1": late, "2": late, "3": late, "4": 0.7 * 0.5}
    assert set(found) == set(expected)
    for name, probability in expected.items():
        assert abs(found[name] - 4000 * probability) < 5 * (4000 * probability * (1 - probability)) ** 0.5, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"participants": 11}, "participants: 11 of 10 clients"),
        ({"participants": 0.01}, "participants: 0.01 of 10 clients are 0 clients"),
        ({"participants": 1.0}, "all clients are 'all', one client is 1"),
        ({"participants": "1.5"}, "above 0 and below 1"),
        ({"participants": 0}, "participants"),
        ({"dropout": 1.0}, "dropout"),
        ({"split": "dirichlet-mix"}, "samples_per_client: goes with the splits dirichlet-mix"),
        ({"samples_per_client": 5}, "samples_per_client: goes with the splits dirichlet-mix"),
        ({"stragglers": -0.1}, "stragglers"),
        ({"participants": 4, "server": "krum", "num_byzantine": 3}, "needs at least 9 clients, got 4"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**fields)


@pytest.mark.parametrize(
    ("given", "cohort"), [("all", 10), (None, 10), ("3", 3), (3, 3), ("0.25", 2), (0.5, 5), (1, 1)]
)
def test_participants_are_a_number_or_a_share(given: object, cohort: int) -> None:
    config = SimulationConfig.model_validate({"participants": given})
    assert config.cohort() == cohort
    assert SimulationConfig.from_yaml(config.to_yaml()) == config


def collected(**fields: Any) -> tuple[Federation, LocalWork]:
    federation = Federation(tiny_config(**{**CROWD, **fields}))
    start = federation.initial_params
    work = LocalWork(federation.config, federation.classifier, Stopwatch(), 2, start, start * 0.01)
    federation.collect(work)
    return federation, work


def test_stragglers_send_what_they_have_by_then() -> None:
    federation, work = collected(stragglers=1.0, local_epochs=3, participants="all", malicious=0)
    drawn = draw_participants(federation.config, 2)
    assert set(drawn.epochs.values()) == {1, 2}
    assert drawn.missing
    assert federation.store.rejected == drawn.missing
    sent = {one.client: one.update for one in federation.store}
    assert list(sent) == sorted(drawn.epochs)
    for client, epochs in drawn.epochs.items():
        shorter = dataclasses.replace(work, config=federation.config.model_copy(update={"local_epochs": epochs}))
        model = shorter.train(client, federation.data[client])
        assert torch.equal(sent[client], model - work.params)


def test_attackers_attack_when_they_are_drawn() -> None:
    attacked, _ = collected(attacker_update="scale", attacker_fisher="random")
    benign, _ = collected(attack="none")
    drawn = draw_participants(attacked.config, 2).clients
    here = {1, 5, 8} & set(drawn)
    assert 0 < len(here) < 3
    assert attacked.store.clients == benign.store.clients == drawn
    for one, other in zip(attacked.store, benign.store, strict=True):
        assert torch.equal(one.update, other.update) != (one.client in here)
    poisoned, _ = collected()
    for client in here:  # model replacement for the clients of this round
        expected = poisoned.store[client].update * (6 / len(here))
        assert torch.equal(attacked.store[client].update, expected)


def test_colluding_attackers_see_those_who_have_sent_something() -> None:
    plain, _ = collected(dropout=0.3)
    colluding, _ = collected(dropout=0.3, attacker_update="ipm")
    attackers = {1, 5, 8} & set(plain.store.clients)
    benign = [one.update.double() for one in plain.store if one.client not in attackers]
    assert attackers
    assert set(plain.store.rejected.values()) == {DROPPED_OUT}
    for client in attackers:
        torch.testing.assert_close(colluding.store[client].update.double(), -2 * torch.stack(benign).mean(0))


@pytest.mark.parametrize("server", ["coalition-fdcr", "foolsgold", "multi-krum"])
def test_a_run_of_a_changing_crowd_is_resumed_to_the_same_bits(tmp_path: Path, server: str) -> None:
    config = tiny_config(**CROWD, server=server, dropout=0.2, stragglers=0.3, attacker_fisher="random", threads=1)
    expected = simulate(config)

    def stop(event: ProgressEvent) -> None:
        if (event.round, event.clients_done) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path, stop)
    resumed = resume(tmp_path)
    assert torch.equal(resumed.params, expected.params)
    assert without_costs(resumed) == without_costs(expected)
    assert resumed.clients == expected.clients


def test_failures_are_recorded_and_the_round_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform = Population.perform

    def fail(self: Population, work: LocalWork, job: Job) -> Upload:
        if (work.round, job.client) == (2, unlucky):
            raise OSError("no space left\non the client's device")
        return perform(self, work, job)

    config = tiny_config(**CROWD, dropout=0.3)
    unlucky = next(iter(draw_participants(config, 2).epochs))
    monkeypatch.setattr(Population, "perform", fail)
    result = simulate(config, tmp_path / "run")
    with (tmp_path / "run" / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.clients) == 18
    (failed,) = [row for row in rows if "failed" in row["reason"]]
    assert (failed["round"], failed["client"]) == ("2", str(unlucky))
    assert failed["reason"] == "failed: OSError: no space left"
    assert (failed["sent"], failed["kept"], float(failed["weight"])) == ("False", "False", 0.0)
    for record in result.rounds:
        drawn = draw_participants(config, record.round)
        mine = [client for client in result.clients if client.round == record.round]
        assert [client.client for client in mine] == list(drawn.clients)
        missing = {client.client for client in mine if not client.sent}
        assert missing == set(drawn.missing) | ({unlucky} if record.round == 2 else set())
        assert all(client.reason for client in mine if not client.sent)
        assert (record.participants, record.missing) == (6, len(missing))
        assert record.kept == sum(client.kept for client in mine)
        sent = [client for client in mine if client.sent]
        benign = [not client.kept for client in sent if not client.malicious]
        attacked = len(benign) < len(sent)
        assert record.false_positive_rate == (sum(benign) / len(benign) if attacked else None)
        assert record.exclusion_rate == sum(not client.kept for client in sent) / len(sent)
    assert result.similarity.shape == (6, 6)
    labels = [text.get_text() for text in similarity_figure(result).axes[0].get_xticklabels()]
    last = [client for client in result.clients if client.round == 3]
    assert labels == [str(client.client) for client in sorted(last, key=lambda client: client.malicious)]
    (legend,) = clients_figure(result).legends
    benign = {client.client for client in result.clients if client.sent and not client.malicious}
    assert f"benign, mean of {len(benign)}" in [text.get_text() for text in legend.get_texts()]


def test_a_round_in_which_nobody_sends_anything_leaves_the_model() -> None:
    config = tiny_config(stragglers=1.0, rounds=1)
    result = simulate(config)
    assert {client.reason for client in result.clients} == {MISSED_DEADLINE}
    assert torch.equal(result.params, Federation(config).initial_params)
    (record,) = result.rounds
    assert (record.true_positive_rate, record.false_positive_rate, record.exclusion_rate) == (None, None, None)


def test_fishers_are_left_out_where_nobody_reads_them(tmp_path: Path) -> None:
    config = tiny_config(server="fedavg", attacker_fisher="benign-mean", rounds=1)
    always = simulate(config)
    needed = simulate(config.model_copy(update={"fishers": "needed"}), tmp_path)
    assert torch.equal(needed.params, always.params)
    assert needed.clients == always.clients
    assert (needed.similarity, needed.rounds[0].fisher_seconds) == (None, 0)
    assert always.rounds[0].fisher_seconds > 0
    assert not (tmp_path / "similarity.png").exists()
    assert resume(tmp_path).similarity is None
    assert collected(fishers="needed", server="fdcr")[0].store.with_fishers


def test_a_fisher_may_be_that_of_some_images() -> None:
    federation, work = collected(fisher_samples=4, malicious=0)
    whole, _ = collected(malicious=0)
    for sent, exact in zip(federation.store, whole.store, strict=True):
        assert torch.equal(sent.update, exact.update)
        data = federation.data[int(str(sent.client))]
        params = work.params + sent.update
        singles = [work.classifier.fisher(params, data.images, data.labels, row) for row in data.indices.split(1)]
        assert sent.fisher is not None
        assert not torch.allclose(sent.fisher, torch.stack(singles).mean(0), rtol=1e-2)
        coefficients = torch.linalg.lstsq(torch.stack(singles).T.double(), sent.fisher[:, None].double()).solution[:, 0]
        chosen = coefficients.round(decimals=3)
        assert sorted(chosen.tolist(), reverse=True)[:4] == [0.25] * 4
        assert chosen.count_nonzero() == 4


def test_steps_are_batches_of_images_that_all_come_before_any_comes_again() -> None:
    federation, work = collected(local_steps=7, batch_size=3, malicious=0)
    for client, data in enumerate(federation.data):
        order = work.order(client, data.indices, 7)
        assert order.shape == (7, 3)
        count = Counter(order.flatten().tolist())
        assert set(count) <= set(data.indices.tolist())
        assert max(count.values()) - min(count[int(index)] for index in data.indices) <= 1
        assert torch.equal(work.order(client, data.indices, 4), order[:4]), "who is slow gets less far on the same way"
    steps = {len(work.order(0, federation.data[0].indices[:n], 7)[0]) for n in (1, 2, 3, 50)}
    assert steps == {1, 2, 3}, "clients with fewer images take all of them"

    assert len(federation.store)
    for sent in federation.store:
        client = int(str(sent.client))
        data = federation.data[client]
        params, velocity = work.params.clone(), torch.zeros_like(work.params)
        for batch in work.order(client, data.indices, 7):
            _, grad = work.classifier.grad(params, data.images, data.labels, batch)
            velocity = grad + work.config.weight_decay * params + work.config.momentum * velocity
            params -= work.config.lr * velocity
        torch.testing.assert_close(sent.update, params - work.params, rtol=1e-4, atol=1e-6)
        assert sent.num_samples == len(data.indices)


def test_who_is_slow_takes_fewer_steps() -> None:
    drawn = draw_participants(tiny_config(clients=200, malicious=0, local_steps=3, local_epochs=9, stragglers=1.0), 1)
    assert set(drawn.epochs.values()) == {1, 2}
    assert set(draw_participants(tiny_config(local_steps=3, local_epochs=9), 1).epochs.values()) == {3}
