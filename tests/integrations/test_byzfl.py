"""Our rules in ByzFL's pipeline, against its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("byzfl")
import byzfl

from fdcr_fast import FDCR, CoordinateMedian, FedAvg, TrimmedMean
from fdcr_fast.integrations.byzfl import Aggregator, RobustAggregator, squared

K, P, F = 9, 50, 2
PAIRS = [
    (FedAvg(), byzfl.Average()),
    (CoordinateMedian(), byzfl.Median()),
    (TrimmedMean(num_byzantine=F), byzfl.TrMean(F)),
]


def attacked(attack):
    torch.manual_seed(0)
    honest = [torch.randn(P, dtype=torch.float64) for _ in range(K - F)]
    return honest + byzfl.ByzantineClient({"name": attack, "f": F, "parameters": {}}).apply_attack(honest)


@pytest.mark.parametrize("attack", ["SignFlipping", "InnerProductManipulation", "ALittleIsEnough", "Gaussian"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda rule: type(rule).__name__)
def test_both_say_the_same_in_every_form(ours, theirs, attack):
    vectors = attacked(attack)
    arrays = [v.numpy() for v in vectors]
    expected = theirs(arrays)
    for form in (vectors, torch.stack(vectors), arrays, np.stack(arrays)):
        step = Aggregator(ours)(form)
        assert type(step) is type(form[0])
        np.testing.assert_allclose(step, expected, rtol=1e-10, atol=1e-12)


def test_pre_aggregations_come_first():
    vectors = attacked("InnerProductManipulation")
    steps = [{"name": "Clipping", "parameters": {"c": 2.0}}, {"name": "NNM", "parameters": {"f": F}}]
    pipeline = RobustAggregator(Aggregator(TrimmedMean(num_byzantine=F)), steps)
    theirs = byzfl.RobustAggregator({"name": "TrMean", "parameters": {"f": F}}, steps)
    torch.testing.assert_close(pipeline.aggregate_vectors(vectors), theirs.aggregate_vectors(vectors))


def test_fishers_of_gradients_and_fishers_of_clients():
    vectors = attacked("Gaussian")
    with pytest.raises(ValueError, match="give fishers="):
        Aggregator(FDCR())
    w, fishers = torch.zeros(P, dtype=torch.float64), torch.stack(vectors) ** 2
    expected = FDCR().aggregate(w, torch.stack(vectors), fishers, [1] * K)
    for given in (squared, lambda _: list(fishers)):
        aggregator = Aggregator(FDCR(), given)
        torch.testing.assert_close(aggregator(vectors), expected.params)
        assert torch.equal(aggregator.result.kept, expected.kept)


BAD_VECTORS = {
    "wrong shape": (torch.ones(P + 1), "must be a vector of 50 parameters, got [51]"),
    "matrix": (torch.ones(1, P), "got [1, 50]"),
    "NaN": (torch.full((P,), torch.nan), "not finite"),
    "wrong dtype": (torch.ones(P, dtype=torch.int64), "must be floating point"),
    "none": (None, "got NoneType"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_a_bad_vector_rejects_its_client_and_the_others_are_aggregated(case):
    bad, reason = BAD_VECTORS[case]
    vectors = attacked("SignFlipping")
    for rule, position in ((FedAvg(), 0), (TrimmedMean(num_byzantine=F), K)):
        aggregator = Aggregator(rule)
        step = aggregator([*vectors[:position], bad, *vectors[position:]])
        torch.testing.assert_close(step, Aggregator(rule)(vectors))
        assert list(aggregator.result.rejected) == [position]
        assert reason in aggregator.result.rejected[position]


def test_missing_fishers_and_nobody_left():
    vectors = attacked("SignFlipping")
    some = [None, *squared(vectors[1:])]
    aggregator = Aggregator(FDCR(), lambda _: some)
    aggregator(vectors)
    assert "the Fisher is no vector" in aggregator.result.rejected[0]
    none = Aggregator(FDCR(), lambda _: [None] * K)
    assert torch.equal(none(vectors), torch.zeros(P, dtype=torch.float64))
    for vectors in ([], [None], ["x"]):
        with pytest.raises(ValueError, match="expected"):
            Aggregator(FedAvg())(vectors)


def test_a_step_of_byzfls_server():
    data = torch.utils.data.TensorDataset(torch.rand(4, 1, 28, 28), torch.arange(4))
    server = byzfl.Server(
        {
            "device": "cpu",
            "model_name": "logreg_mnist",
            "optimizer_name": "SGD",
            "learning_rate": 1.0,
            "weight_decay": 0.0,
            "milestones": [],
            "learning_rate_decay": 1.0,
            "aggregator_info": {"name": "Average", "parameters": {}},
            "pre_agg_list": [],
            "test_loader": torch.utils.data.DataLoader(data),
        }
    )
    server.robust_aggregator = RobustAggregator(Aggregator(CoordinateMedian()))
    before = nn.utils.parameters_to_vector(server.model.parameters()).detach().clone()
    gradients = [torch.full_like(before, float(k)) for k in (1, 2, 100)]
    server.update_model_with_gradients(gradients)
    torch.testing.assert_close(nn.utils.parameters_to_vector(server.model.parameters()), before - 2)
