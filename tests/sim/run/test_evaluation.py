"""How good a global model is, and whether it is dead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast.sim import resume, simulate
from fdcr_fast.sim.run import figures
from fdcr_fast.sim.run.evaluation import match_rate, problem_of
from fdcr_fast.sim.run.federation import Federation
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    ("predicted", "labels", "problem"),
    [
        ([1] * 40, [0, 1] * 20, "constant"),
        ([0, 1] * 20, [0, 1] * 20, None),
        ([0, 1, 1, 0] * 10, [0, 1] * 20, "chance"),
        ([0, 1] * 13 + [1, 0] * 7, [0, 1] * 20, "chance"),  # 65 %, and 50 + 2 * 7.9 % are chance
        ([0, 1] * 14 + [1, 0] * 6, [0, 1] * 20, None),  # 70 %
        ([1] * 39 + [0], [0] * 10 + [1] * 30, "chance"),
        ([0] * 10, [0] * 10, None),  # where there is one class, to predict it is no problem
        ([2], [0], None),
    ],
)
def test_problems_of_predictions(predicted: list[int], labels: list[int], problem: str | None) -> None:
    assert problem_of(torch.tensor(predicted), torch.tensor(labels)) == problem


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_match_rate_counts(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = torch.tensor(pairs).T
    assert match_rate(predicted, expected) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert match_rate(predicted, 1) == pytest.approx(sum(a == 1 for a, _ in pairs) / len(pairs))


def test_the_loss_is_the_mean_cross_entropy_of_the_test_images() -> None:
    federation = Federation(tiny_config())
    params, record, _ = federation.run_round(1, federation.initial_params, None)
    federation.classifier.load(params)
    losses = []
    for image, label in zip(federation.evaluate.images, federation.evaluate.labels.tolist(), strict=True):
        logits = [math.exp(value) for value in federation.classifier.model(image[None])[0].tolist()]
        losses.append(-math.log(logits[label] / sum(logits)))
    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_models_that_are_not_finite_have_diverged(value: float) -> None:
    federation = Federation(tiny_config())
    evaluation = federation.evaluate(federation.classifier, torch.full_like(federation.initial_params, value))
    assert (evaluation.problem, evaluation.loss) == ("diverged", None)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"lr": 1e30}, "diverged"),  # of every client: all uploads are rejected, and the model stays
        ({"lr": 30.0, "server": "fedavg"}, "constant"),
        ({"lr": 0.1, "local_epochs": 8, "attack": "none"}, None),
    ],
)
def test_a_dead_model_is_reported_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], problem: str | None
) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda *_: None)
    result = simulate(tiny_config(**fields), tmp_path)
    assert result.rounds[-1].problem == problem
    assert result.summary.problems == ({} if problem is None else {problem: 2})
    assert json.loads((tmp_path / "summary.json").read_text())["problems"] == result.summary.problems
    last = (tmp_path / "rounds.csv").read_text().splitlines()[-1].split(",")
    assert last[3] == (problem or "")
    assert resume(tmp_path).rounds == result.rounds


@pytest.mark.parametrize(
    ("fields", "attacked"),
    [
        ({"malicious": 0}, []),
        ({"attack": "none"}, []),
        ({"poison_share": 0.0}, []),
        ({"attack": "none", "attacker_update": "sign-flip"}, [1, 2]),
        ({"attack_rounds": "2"}, [2]),
        ({"attack_rounds": "1"}, [1]),
    ],
)
def test_rates_of_detection_are_blank_in_rounds_in_which_nobody_attacks(
    fields: dict[str, Any], attacked: list[int]
) -> None:
    result = simulate(tiny_config(server="fdcr", **fields))
    for record in result.rounds:
        defined = record.round in attacked
        assert (record.true_positive_rate is not None, record.false_positive_rate is not None) == (defined, defined)
        assert record.exclusion_rate == 1 - record.kept / 4
    assert (result.summary.true_positive_rate is None) == (not attacked)
    assert (result.summary.false_positive_rate is None) == (not attacked)
    assert (result.summary.attack_success_rate is None) == (fields.get("attack") == "none")


def test_malicious_clients_who_have_nothing_to_do_are_benign() -> None:
    idle, benign = (
        simulate(tiny_config(server="fedavg", **fields)) for fields in ({"attack": "none"}, {"malicious": 0})
    )
    assert torch.equal(idle.params, benign.params)
