"""The aggregator in NVFlare's FedAvg controller, with results that travel as its objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare")
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg as Controller

from fdcr_fast import FDCR, CoalitionFDCR, FedAvg
from fdcr_fast.integrations.nvflare import FDCRAggregator, train_result
from tests.support.federation import COUNTS, Client, K, assert_same_state, expected, network


class Federation(Controller):
    """NVFlare's controller, with clients that answer at once."""

    def __init__(self, aggregator, num_rounds=1, numpy=True, params_type=ParamsType.FULL, spoil=None):
        state = {k: v.numpy() if numpy else v for k, v in network().state_dict().items()}
        super().__init__(num_clients=K, num_rounds=num_rounds, aggregator=aggregator, model=FLModel(params=state))
        self.params_type, self.spoil, self.saved, self.fl_ctx = params_type, spoil, None, FLContext()
        self.accepted = []

    def send_model(self, task_name, targets, data, callback):
        task = FLModelUtils.to_shareable(data)
        self.fl_ctx.set_prop(AppConstants.TRAIN_SHAREABLE, task)
        self.aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, self.fl_ctx)
        for name in targets:
            client = Client(int(name))
            result = train_result(
                client.trained({k: torch.as_tensor(v) for k, v in data.params.items()}),
                client.fisher,
                client.num_samples,
                {"loss": float(client.k)},
            )
            if self.params_type == ParamsType.DIFF:
                params = {k: v - torch.as_tensor(data.params[k]) for k, v in result.params.items()}
                result = FLModel(params_type=ParamsType.DIFF, params=params, metrics=result.metrics, meta=result.meta)
            if client.k == 2 and self.spoil:
                self.spoil(result)
            result.meta["client_name"] = name
            self.accepted.append(callback(result))

    def sample_clients(self, num_clients=None):
        return [str(k) for k in range(K)]

    def get_num_standing_tasks(self):
        return 0

    def save_model(self, model):
        self.saved = model

    def run(self):
        super().run()
        return self.saved

    event = info = warning = fire_event_with_data = lambda self, *args, **kwargs: None


def as_tensors(params):
    return {name: torch.as_tensor(value) for name, value in params.items()}


@pytest.mark.parametrize("params_type", [ParamsType.FULL, ParamsType.DIFF])
@pytest.mark.parametrize("rule", [FDCR, FedAvg, CoalitionFDCR])
def test_rounds_are_those_of_plain_pytorch(rule, params_type):
    aggregator = FDCRAggregator(rule.__name__, max_clients=K)
    saved = Federation(aggregator, 2, params_type == ParamsType.DIFF, params_type).run()
    state, reference = network().state_dict(), rule()
    for _ in range(2):
        state, chosen = expected(state, [Client(k) for k in range(K)], reference)
    assert {type(v) for v in saved.params.values()} == {np.ndarray if params_type == ParamsType.DIFF else torch.Tensor}
    assert_same_state(as_tensors(saved.params), state)
    weights = [n * k for n, k in zip(COUNTS, chosen.kept.tolist(), strict=True)]
    assert saved.metrics["loss"] == pytest.approx(np.average(range(K), weights=weights))


def fisher(**values):
    return lambda result: result.meta["fisher"].update({k.replace("_", "."): v for k, v in values.items()})


def params(**values):
    return lambda result: result.params.update({k.replace("_", "."): v for k, v in values.items()})


BAD_RESULTS = {
    "missing Fisher": (lambda r: r.meta.pop("fisher"), "the Fisher is no vector"),
    "part of the Fisher": (lambda r: r.meta["fisher"].pop("3.bias"), "missing parameters: 3.bias"),
    "NaN in the Fisher": (fisher(**{"3_bias": np.full(3, np.nan, "f4")}), "Fisher is not finite"),
    "Fisher of the wrong shape": (fisher(**{"3_bias": np.ones(4, "f4")}), "3.bias (4,), expected (3,)"),
    "missing parameter": (lambda r: r.params.pop("3.bias"), "missing parameters: 3.bias"),
    "no mapping": (lambda r: setattr(r, "params", [1.0]), "has no attribute"),
    "wrong shape": (params(**{"3_bias": np.ones(4, "f4")}), "3.bias (4,), expected (3,)"),
    "NaN": (params(**{"3_bias": np.full(3, np.nan, "f4")}), "update is not finite"),
    "wrong dtype": (params(**{"3_bias": np.ones(3, "i8")}), "3.bias must be floating point"),
    "text": (params(**{"3_bias": "hello"}), "got str"),
    "missing num-examples": (lambda r: r.meta.pop("NUM_STEPS_CURRENT_ROUND"), "must be a number, got None"),
    "no examples": (lambda r: r.meta.update(NUM_STEPS_CURRENT_ROUND=-1), "must be positive"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_bad_result_rejects_its_client_and_the_round_goes_on(case):
    spoil, reason = BAD_RESULTS[case]
    aggregator = FDCRAggregator(FDCR(), max_clients=K)
    federation = Federation(aggregator, num_rounds=2, spoil=spoil)
    saved = federation.run()
    assert federation.accepted == [True] * 2 * K
    assert list(aggregator.result.rejected) == ["2"]
    assert reason in aggregator.result.rejected["2"]
    state = network().state_dict()
    for _ in range(2):
        state, _ = expected(state, [Client(k) for k in range(K) if k != 2])
    assert_same_state(as_tensors(saved.params), state)


def test_more_clients_than_foreseen_are_rejected():
    aggregator = FDCRAggregator(FedAvg(), max_clients=K - 1)
    Federation(aggregator).run()
    assert list(aggregator.result.rejected) == [str(K - 1)]
    assert "the store is full" in aggregator.result.rejected[str(K - 1)]


def test_a_bad_call_says_what_was_expected():
    with pytest.raises(ValueError, match="no rule 'StateStore'"):
        FDCRAggregator("StateStore")
    with pytest.raises(RuntimeError, match="the global state is not known"):
        FDCRAggregator().aggregate_model()
