from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdcr_fast.sim import RoundRecord, Summary
from fdcr_fast.sim.run.metrics import MEASURES, METRICS, share, summarize
from fdcr_fast.sim.run.report import COMPARED


@given(chosen=st.sets(st.integers(0, 9)), among=st.sets(st.integers(0, 9)))
def test_share_counts(chosen: set[int], among: set[int]) -> None:
    count = 0
    for client in among:
        count += client in chosen
    assert share(chosen, among) == (count / len(among) if among else None)


def record(number: int, **fields: object) -> RoundRecord:
    defaults: dict[str, object] = {
        "round": number,
        "accuracy": number / 100,
        "loss": 1.5,
        "problem": None,
        "attack_success_rate": 1 - number / 100,
        "backdoor_failure_rate": number / 100,
        "tradeoff": number / 100,
        "true_positive_rate": None,
        "false_positive_rate": number / 10,
        "exclusion_rate": number / 20,
        "participants": 6,
        "missing": 2,
        "kept": 3,
        "rejected": 1,
        "seconds": number / 8,
        "training_seconds": 1.0,
        "fisher_seconds": 2.0,
        "aggregation_seconds": 3.0,
        "evaluation_seconds": 4.0,
        "peak_rss_bytes": 100 - number,
    }
    return RoundRecord.model_validate({**defaults, **fields})


@pytest.mark.parametrize(("rounds", "averaged"), [(7, [3, 4, 5, 6, 7]), (5, [1, 2, 3, 4, 5]), (2, [1, 2])])
def test_the_summary_averages_the_last_five_rounds(rounds: int, averaged: list[int]) -> None:
    summary = summarize([record(number) for number in range(1, rounds + 1)])
    mean = sum(averaged) / len(averaged) / 100
    assert summary.accuracy == pytest.approx(mean)
    assert summary.attack_success_rate == pytest.approx(1 - mean)
    assert summary.false_positive_rate == pytest.approx(10 * mean)
    assert summary.true_positive_rate is None
    assert summary.exclusion_rate == pytest.approx(5 * mean)
    assert summary.problems == {}
    assert summary.seconds == sum(range(1, rounds + 1)) / 8
    assert summary.phase_seconds == {
        "training": rounds,
        "fisher": 2 * rounds,
        "aggregation": 3 * rounds,
        "evaluation": 4 * rounds,
    }
    assert (summary.peak_rss_bytes, summary.rejected, summary.missing) == (99, rounds, 2 * rounds)
    assert (summary.rounds, summary.averaged_rounds) == (rounds, len(averaged))


def test_the_summary_counts_the_problems_of_the_rounds_that_it_averages() -> None:
    problems = ["diverged", None, "chance", "constant", None, "constant"]
    summary = summarize([record(number, problem=problem) for number, problem in enumerate(problems, 1)])
    assert summary.problems == {"chance": 1, "constant": 2}
    assert json.loads(summary.model_dump_json())["problems"] == {"chance": 1, "constant": 2}


def test_no_rounds_no_summary() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        summarize([])


def test_every_metric_has_its_fields() -> None:
    for name in METRICS:
        assert name in RoundRecord.model_fields
        assert name in Summary.model_fields
        if name != "accuracy":  # which all runs have
            assert RoundRecord.model_fields[name].default is None, "runs that began without it could not be resumed"
            assert Summary.model_fields[name].default is None, "results of earlier runs could not be read"
    assert {measure.metric for measure in MEASURES.values()} == set(METRICS)
    assert set(COMPARED) <= set(METRICS) & set(MEASURES)
