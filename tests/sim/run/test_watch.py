"""Rules that look on: what is recorded of them, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdcr_fast import CoalitionFDCR, FedAvg
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.sim import simulate
from fdcr_fast.sim.run.figures import ranks_figure
from fdcr_fast.sim.run.watch import area_under_curve, judged
from tests.support.tiny import tiny_config, without_costs

WATCHED = "coalition-fdcr, fdcr, median"


class Additive(FedAvg):
    """A rule that suspects sets by the sum of what it thinks of their clients."""

    def set_scores(self, clients: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        weights = torch.tensor([float(client) - 2.5 for client in clients], dtype=torch.float64)
        return lambda members: members.double() @ weights


def result_of(scores: list[float], kept: list[bool], rejected: tuple[int, ...] = ()) -> AggregationResult:
    K = len(scores)
    labels = torch.tensor([-1 if k in rejected else int(not inside) for k, inside in enumerate(kept)])
    zeros = torch.zeros(K, dtype=torch.float64)
    given = torch.tensor(scores, dtype=torch.float64)
    return AggregationResult(zeros, zeros, given, torch.tensor(kept), labels, tuple(range(K)), {})


@pytest.mark.parametrize("server", ["oracle", "fdcr", "coalition-fdcr"])
def test_who_looks_on_changes_nothing(server: str) -> None:
    plain = simulate(tiny_config(server=server, rounds=3))
    seen = simulate(tiny_config(server=server, rounds=3, watch=WATCHED))
    assert torch.equal(seen.params, plain.params)
    assert without_costs(seen) == without_costs(plain)
    assert seen.clients == plain.clients
    assert not plain.scores
    assert not plain.ranks


@pytest.mark.parametrize("server", ["fdcr", "coalition-fdcr"])
def test_who_looks_on_at_its_own_trajectory_says_what_the_server_says(server: str) -> None:
    result = simulate(tiny_config(server=server, clients=6, malicious="1,4", rounds=3, watch=WATCHED))
    said = [record for record in result.scores if record.rule == server]
    assert [(r.round, r.client, r.malicious, r.score, r.kept) for r in said] == [
        (r.round, r.client, r.malicious, r.discrepancy, r.kept) for r in result.clients
    ]
    rates = [(r.true_positive_rate, r.false_positive_rate) for r in result.ranks if r.rule == server]
    assert rates == [(r.true_positive_rate, r.false_positive_rate) for r in result.rounds]


def test_who_looks_on_remembers_what_it_saw_of_an_oracles_rounds() -> None:
    watch = {"coalition-fdcr": {"start": "bold"}, "fdcr": {}, "median": {}}
    config = tiny_config(server="oracle", clients=6, malicious="1,4", rounds=3, watch=watch)
    result = simulate(config)
    assert len(result.ranks) == 3 * 3
    assert len(result.scores) == 3 * 3 * 6
    sets = [record for record in result.ranks if record.rule == "coalition-fdcr"]
    assert [record.sets for record in sets] == [6 + 15] * 3
    for record in sets:
        assert record.set_score is not None
        assert record.dropped_score is not None
        assert (record.set_rank == 0) == (record.set_score == pytest.approx(record.dropped_score))
    by_round = [[r.score for r in result.scores if (r.rule, r.round) == ("coalition-fdcr", n)] for n in (1, 2, 3)]
    alone = simulate(config.model_copy(update={"rounds": 1}))
    assert [r.score for r in alone.scores if r.rule == "coalition-fdcr"] == by_round[0]
    forgetful = simulate(config.model_copy(update={"watch": {"coalition-fdcr": {"start": "bold", "decay": 1e-9}}}))
    assert [r.score for r in forgetful.scores if r.round == 1] == pytest.approx(by_round[0])
    assert [r.score for r in forgetful.scores if r.round == 3] != pytest.approx(by_round[2])


def test_the_rank_of_the_attackers_set_is_the_number_of_sets_above_it() -> None:
    scores = [0.5, 3.0, 1.0, 3.0, 2.0, -1.0]
    result = result_of(scores, [True, False, True, True, True, False])
    _, ranks = judged("additive", 7, Additive(), result, torch.ones(6), {1, 4})
    # The sets of {0..5} with one or two clients, each worth k - 2.5; {1, 4} is worth 0.
    assert ranks.sets == 6 + 15
    assert ranks.set_rank == sum([0.5, 1.5, 2.5].count(k - 2.5) for k in range(6)) + sum(
        i + j - 5 > 0 for i in range(6) for j in range(i)
    )
    assert (ranks.set_score, ranks.dropped_score) == (0.0, 1.0)
    assert (ranks.round, ranks.rule, ranks.attackers) == (7, "additive", 2)
    assert (ranks.true_positive_rate, ranks.false_positive_rate) == (0.5, 0.25)
    assert (ranks.first_rank, ranks.last_rank) == (0, 2)


def test_ranks_of_clients_and_what_is_left_out() -> None:
    scores = [0.5, 3.0, 1.0, 3.0, float("nan"), -1.0]
    result = result_of(scores, [True, False, True, True, False, True], rejected=(4,))
    norms = torch.tensor([1.0, 4.0, 2.0, 3.0, 100.0, 0.5])
    clients, ranks = judged("any", 1, FedAvg(), result, norms, {2, 3, 4})
    assert [record.rank for record in clients] == [3, 0, 2, 0, None, 4]
    assert [record.score for record in clients] == [0.5, 3, 1, 3, None, -1]
    assert [record.malicious for record in clients] == [False, False, True, True, True, False]
    assert [record.relative_norm for record in clients] == [0.5, 2, 1, 1.5, 50, 0.25]
    assert (ranks.first_rank, ranks.last_rank) == (0, 2)
    assert ranks.true_positive_rate == pytest.approx(1 / 3), "the rejected one"
    assert (ranks.sets, ranks.set_rank, ranks.set_score) == (None, None, None), "it judges no sets"
    nobody = judged("any", 1, Additive(), result, norms, set())[1]
    assert (nobody.true_positive_rate, nobody.area_under_curve, nobody.set_rank) == (None, None, None)


def test_what_is_said_does_not_depend_on_who_attacked() -> None:
    result = result_of([1.0, 2, 3, 4], [True, True, True, False])
    said = [judged("any", 1, FedAvg(), result, torch.ones(4), truth)[0] for truth in ({0}, {2, 3})]
    without = [[record.model_copy(update={"malicious": None}) for record in records] for records in said]
    assert without[0] == without[1]


def test_of_many_clients_sets_are_scored_and_not_ranked() -> None:
    torch.manual_seed(0)
    K, P = 20, 40
    rule = CoalitionFDCR(start="bold")
    result = rule.aggregate(torch.zeros(P), torch.randn(K, P), torch.rand(K, P), [1] * K)
    ranks = judged("coalition", 1, rule, result, torch.ones(K), {0, 1})[1]
    assert (ranks.sets, ranks.set_rank) == (None, None)
    assert ranks.set_score is not None
    assert ranks.dropped_score is not None
    assert ranks.set_score < ranks.dropped_score


def test_the_area_under_the_curve_is_what_counting_pairs_gives() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 6, 12).astype(float)
        scores[rng.random(12) < 0.2] = np.nan
        malicious = rng.random(12) < 0.4
        pairs = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a in scores[malicious]
            for b in scores[~malicious]
            if not np.isnan(a) and not np.isnan(b)
        ]
        got = area_under_curve(torch.from_numpy(scores), torch.from_numpy(malicious))
        assert got == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_the_run_writes_what_it_saw(tmp_path: Path) -> None:
    result = simulate(tiny_config(server="oracle", watch=WATCHED), tmp_path)
    header, *lines = (tmp_path / "ranks.csv").read_text().splitlines()
    assert header.split(",")[:3] == ["round", "rule", "attackers"]
    assert len(lines) == 2 * 3
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + 2 * 3 * 4
    assert (tmp_path / "ranks.png").exists()
    panels = ranks_figure(result).axes[:3]
    assert [axes.get_title() for axes in panels] == [f"ranked by {rule}" for rule in WATCHED.split(", ")]
    attackers = [record.rank for record in result.scores if record.rule == "coalition-fdcr" and record.malicious]
    sets = [record.set_rank for record in result.ranks if record.rule == "coalition-fdcr"]
    assert [line.get_ydata().tolist() for line in panels[0].get_lines()] == [attackers, sets]
    assert not panels[2].get_lines(), "the median computes no scores"


def test_a_run_without_onlookers_writes_nothing_of_them(tmp_path: Path) -> None:
    simulate(tiny_config(), tmp_path)
    assert not {"ranks.csv", "scores.csv", "ranks.png"} & {path.name for path in tmp_path.iterdir()}


def test_fishers_are_computed_for_who_looks_on() -> None:
    config = tiny_config(server="fedavg", fishers="needed", watch="coalition-fdcr")
    assert all(record.score is not None for record in simulate(config).scores)
