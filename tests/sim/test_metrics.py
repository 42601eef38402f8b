from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import UpdateStore
from fdcr_fast.sim import RoundRecord
from fdcr_fast.sim.metrics import Stopwatch, importance_similarity, match_rate, share, summarize


@given(chosen=st.sets(st.integers(0, 9)), among=st.sets(st.integers(0, 9)))
def test_share_counts(chosen: set[int], among: set[int]) -> None:
    count = 0
    for client in among:
        count += client in chosen
    assert share(chosen, among) == (count / len(among) if among else None)


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_match_rate_counts(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = torch.tensor(pairs).T
    assert match_rate(predicted, expected) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert match_rate(predicted, 1) == pytest.approx(sum(a == 1 for a, _ in pairs) / len(pairs))


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


@settings(max_examples=30, deadline=None)
@given(
    num_params=st.integers(2, 40),
    accepted=st.lists(st.booleans(), min_size=1, max_size=6),
    tile=st.integers(1, 48),
    seed=st.integers(0, 100),
)
def test_similarity_is_the_cosine_of_importances(num_params: int, accepted: list[bool], tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients = len(accepted)
    fishers = rng.random((clients, num_params)).astype(np.float32)
    store = UpdateStore(num_params, clients, tile=tile)
    store._rows.data.fill_(float("nan"))
    for client, good in enumerate(accepted):
        update = np.full(num_params, 1.0 if good else np.nan, dtype=np.float32)
        assert store.put(update, fishers[client], 1, client_id=client) == good
    similarity = importance_similarity(store.client_updates(), range(clients)).numpy()
    exact = fishers.astype(np.float64)
    for i in range(clients):
        for j in range(clients):
            a, b = ((f - f.min()) / (f.max() - f.min()) for f in (exact[i], exact[j]))
            expected = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
            expected = expected if accepted[i] and accepted[j] else np.nan
            np.testing.assert_allclose(similarity[i, j], expected, rtol=1e-9)


def test_similarity_needs_fishers() -> None:
    with pytest.raises(ValueError, match="no Fishers"):
        importance_similarity(UpdateStore(3, 2, with_fishers=False).client_updates(), [0, 1])


def test_the_stopwatch_adds_up_also_after_an_error() -> None:
    clock = Stopwatch()
    with pytest.raises(KeyError), clock.phase("fisher"):
        raise KeyError
    first = clock.seconds["fisher"]
    with clock.phase("fisher"):
        pass
    assert clock.seconds["fisher"] > first > 0
    assert clock.seconds["training"] == 0
