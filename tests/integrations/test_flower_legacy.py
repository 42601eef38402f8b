"""The strategy of Flower's older API, called as its server calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.common import Code, EvaluateRes, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from fdcr_fast import FDCR, FedAvg
from fdcr_fast.integrations.flower_legacy import LegacyFDCRStrategy, fit_result
from tests.support.federation import Client, K, assert_same_state, expected, network

NAMES = list(network().state_dict())
OK = Status(Code.OK, "")


class Proxy(ClientProxy):
    def fit(self, ins, timeout, group_id):
        client = Client(int(self.cid))
        state = {k: torch.tensor(v) for k, v in zip(NAMES, parameters_to_ndarrays(ins.parameters), strict=True)}
        arrays, num_examples, metrics = fit_result(client.trained(state), client.fisher, client.num_samples, {"a": 1})
        return FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)

    get_properties = get_parameters = evaluate = reconnect = None


def run(strategy, num_rounds=1, spoil=None):
    manager = SimpleClientManager()
    for k in range(K):
        manager.register(Proxy(str(k)))
    parameters = ndarrays_to_parameters([v.numpy() for v in network().state_dict().values()])
    for r in range(num_rounds):
        results = [(p, p.fit(ins, None, None)) for p, ins in strategy.configure_fit(r, parameters, manager)]
        for proxy, answer in results:
            if spoil and proxy.cid == "2":
                spoil(answer)
        aggregated, metrics = strategy.aggregate_fit(r, results, [])
        parameters = aggregated or parameters
    return dict(zip(NAMES, parameters_to_ndarrays(parameters), strict=True)), metrics


def strategy(rule=None, **options):
    options = {"names": NAMES, "min_fit_clients": K, "min_available_clients": K, **options}
    return LegacyFDCRStrategy(rule, **options)


@pytest.mark.parametrize("rule", [FDCR(), FedAvg()], ids=["FDCR", "FedAvg"])
def test_rounds_are_those_of_plain_pytorch(rule):
    state, metrics = run(strategy(rule, fit_metrics_aggregation_fn=lambda m: {"seen": m}), num_rounds=2)
    reference = network().state_dict()
    for _ in range(2):
        reference, chosen = expected(reference, [Client(k) for k in range(K)], rule)
    assert_same_state(state, reference)
    assert [m for _, m in metrics["seen"]] == [{"a": 1}] * int(chosen.kept.sum())


def entry(i, array):
    def spoil(answer):
        answer.parameters.tensors[i] = ndarrays_to_parameters([array]).tensors[0]

    return spoil


def fisher(value):
    return lambda answer: answer.metrics.update(fisher=value)


P = sum(p.numel() for p in network().parameters())
BAD_RESULTS = {
    "missing Fisher": (lambda answer: answer.metrics.pop("fisher"), "no Fisher"),
    "Fisher of another type": (fisher("yes"), "is of type str"),
    "broken Fisher": (fisher(b"\x93NUMPY"), ""),
    "short Fisher": (fisher(ndarrays_to_parameters([np.ones(3, "f4")]).tensors[0]), "must be a vector of"),
    "NaN in the Fisher": (
        fisher(ndarrays_to_parameters([np.full(P, np.nan, "f4")]).tensors[0]),
        "Fisher is not finite",
    ),
    "missing array": (lambda answer: answer.parameters.tensors.pop(), "expected 9 arrays, got 8"),
    "wrong shape": (entry(-1, np.ones(4, "f4")), "3.bias (4,), expected (3,)"),
    "NaN": (entry(-1, np.full(3, np.nan, "f4")), "update is not finite"),
    "wrong dtype": (entry(-1, np.ones(3, "i4")), "3.bias must be floating point"),
    "missing num-examples": (lambda answer: setattr(answer, "num_examples", None), "must be a number"),
    "no examples": (lambda answer: setattr(answer, "num_examples", 0), "must be positive"),
    "no parameters": (lambda answer: setattr(answer, "parameters", None), ""),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_bad_result_rejects_its_client_and_the_round_goes_on(case):
    spoil, reason = BAD_RESULTS[case]
    defended = strategy()
    state, _ = run(defended, spoil=spoil)
    assert list(defended.result.rejected) == ["2"]
    assert reason in defended.result.rejected["2"]
    assert_same_state(state, expected(network().state_dict(), [Client(k) for k in range(K) if k != 2])[0])


def test_numbers_for_names_make_all_floats_parameters():
    defended = strategy(FedAvg(), names=None)
    state, _ = run(defended)
    assert_same_state(state, expected(network().state_dict(), [Client(k) for k in range(K)], FedAvg())[0])
    assert defended.result.params.numel() == P + 4


def test_metrics_end_no_run():
    def fail(metrics):
        raise KeyError("a")

    defended = strategy(fit_metrics_aggregation_fn=fail, accept_failures=False)
    assert run(defended)[1] == {}
    assert defended.aggregate_fit(1, [(Proxy("0"), None)], [OSError()]) == (None, {})
    answers = [
        (Proxy(str(k)), EvaluateRes(OK, *values, {})) for k, values in enumerate([(1.0, 2), (np.nan, 3), (5.0, 0)])
    ]
    assert defended.aggregate_evaluate(1, answers, [])[0] == 1.0
