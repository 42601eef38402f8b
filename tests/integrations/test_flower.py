"""The strategy in Flower's own loop, with messages that travel as Flower's objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fdcr_fast import FDCR, CoalitionFDCR, FedAvg, UpdateStore
from fdcr_fast.integrations.flower import FDCRStrategy, train_reply
from tests.support.federation import COUNTS, Client, K, assert_same_state, expected, network

# Who runs: Flower's runtimes say it, and its messages ask for it.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class Federation:
    """A grid of K clients; ``spoil(reply, message)`` may answer for some of them."""

    def __init__(self, difference=False, spoil=None):
        self.clients = [Client(k) for k in range(K)]
        self.difference, self.spoil = difference, spoil or {}

    def get_node_ids(self):
        return range(K)

    def send_and_receive(self, messages, timeout=None):
        replies = [self.answer(message) for message in messages]
        return [reply for reply in replies if reply is not None]

    def answer(self, message):
        client = self.clients[message.metadata.dst_node_id]
        if message.metadata.message_type == "evaluate":
            reply = Message(RecordDict({"m": MetricRecord({"loss": 2.0, "num-examples": 4})}), reply_to=message)
        else:
            model = client.trained(message.content["arrays"].to_torch_state_dict())
            loss = {"loss": float(client.k)}
            reply = train_reply(message, model, client.fisher, client.num_samples, loss, difference=self.difference)
        spoil = self.spoil.get(client.k)
        return reply if spoil is None else spoil(reply, message)


def run(strategy, federation, num_rounds=1, evaluate=0.0):
    strategy.fraction_evaluate = evaluate
    return strategy.start(federation, ArrayRecord(network().state_dict()), num_rounds)


def strategy(rule=None):
    return FDCRStrategy(rule, min_available_nodes=K)


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("rule", [FDCR, FedAvg, CoalitionFDCR])
def test_rounds_are_those_of_plain_pytorch(rule, difference):
    federation, defended = Federation(difference), strategy(rule())
    result = run(defended, federation, num_rounds=2, evaluate=1.0)
    state, reference = network().state_dict(), rule()
    for _ in range(2):
        state, chosen = expected(state, federation.clients, reference)
    assert_same_state(result.arrays.to_torch_state_dict(), state)
    kept = {node: bool(k) for node, k in zip(defended.result.clients, defended.result.kept, strict=True)}
    assert kept == dict(zip(chosen.clients, chosen.kept.tolist(), strict=True))
    metrics = result.train_metrics_clientapp[2]
    assert metrics["loss"] == pytest.approx(np.average(range(K), weights=[n * kept[k] for k, n in enumerate(COUNTS)]))
    assert metrics["num-kept"] + metrics["num-dropped"] == K
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(2.0)


def test_a_reply_goes_into_the_store_from_the_bytes_that_came(monkeypatch):
    pointers = set()
    put = UpdateStore.put

    def spy(self, update, fisher, *rest, **options):
        pointers.update(t.data_ptr() for t in (*update.values(), *fisher.values()))
        return put(self, update, fisher, *rest, **options)

    monkeypatch.setattr(UpdateStore, "put", spy)
    sent = []
    federation = Federation(
        difference=True, spoil=dict.fromkeys(range(K), lambda reply, _: sent.append(reply) or reply)
    )
    run(strategy(), federation)
    for reply in sent:
        for record in (reply.content["update"], reply.content["fisher"]):
            for name in record.keys() - {"1.running_mean", "1.running_var", "1.num_batches_tracked"}:
                start = np.frombuffer(record[name].data, np.uint8).ctypes.data
                assert any(start < p < start + len(record[name].data) for p in pointers)


def test_one_flat_fisher():
    def flat(reply, message):
        fisher = torch.cat([t.flatten() for t in reply.content["fisher"].to_torch_state_dict().values()])
        reply.content["fisher"] = ArrayRecord({"everything": Array(fisher.numpy())})
        return reply

    named, other = run(strategy(), Federation()), run(strategy(), Federation(spoil=dict.fromkeys(range(K), flat)))
    assert_same_state(other.arrays.to_torch_state_dict(), named.arrays.to_torch_state_dict())


def edit(record, change):
    """A reply with one record changed, or missing where there is no change."""

    def spoil(reply, message):
        if change is None:
            del reply.content[record]
        else:
            change(reply.content[record])
        return reply

    return spoil


def arrays(**values):
    return lambda record: record.update({k.replace("_", "."): Array(np.asarray(v)) for k, v in values.items()})


def no_arrays(reply, message):
    return Message(RecordDict({"config": ConfigRecord({"arrays": "yes"})}), reply_to=message)


def raw(data):
    return lambda record: record.update({"3.bias": Array("float32", (3,), "numpy.ndarray", data)})


BAD_REPLIES = {
    "missing Fisher": (edit("fisher", None), "no ArrayRecord 'fisher'"),
    "part of the Fisher": (edit("fisher", lambda r: r.pop("3.bias")), "missing parameters: 3.bias"),
    "NaN in the Fisher": (edit("fisher", arrays(**{"3_bias": np.full(3, np.nan, "f4")})), "Fisher is not finite"),
    "negative Fisher": (edit("fisher", arrays(**{"3_bias": -np.ones(3, "f4")})), "negative entries"),
    "Fisher of the wrong shape": (edit("fisher", arrays(**{"3_bias": np.ones(4, "f4")})), "wrong shape: 3.bias (4,)"),
    "missing arrays": (edit("arrays", None), "no ArrayRecord 'arrays'"),
    "missing parameter": (edit("arrays", lambda r: r.pop("3.bias")), "missing parameters: 3.bias"),
    "wrong shape": (edit("arrays", arrays(**{"3_bias": np.ones(4, "f4")})), "wrong shape: 3.bias (4,), expected (3,)"),
    "NaN": (edit("arrays", arrays(**{"3_bias": np.full(3, np.nan, "f4")})), "update is not finite"),
    "wrong dtype": (edit("arrays", arrays(**{"3_bias": np.ones(3, "i8")})), "3.bias must be floating point"),
    "missing buffer": (edit("arrays", lambda r: r.pop("1.running_var")), "missing buffer: 1.running_var"),
    "broken bytes": (edit("arrays", raw(b"\x93NUMPY\x01\x00garbage")), ""),
    "pickled bytes": (edit("arrays", raw(b"\x80\x04]\x94.")), ""),
    "missing num-examples": (edit("metrics", lambda r: r.pop("num-examples")), "no MetricRecord with 'num-examples'"),
    "no metrics": (edit("metrics", None), "no MetricRecord with 'num-examples'"),
    "several num-examples": (edit("metrics", lambda r: r.update({"num-examples": [1, 2]})), "must be a number"),
    "no examples": (edit("metrics", lambda r: r.update({"num-examples": 0})), "must be positive"),
    "error": (lambda reply, message: Message(Error(7, "out of memory"), reply_to=message), "out of memory"),
    "no records": (no_arrays, "no ArrayRecord 'arrays'"),
}


@pytest.mark.parametrize("case", BAD_REPLIES)
def test_a_bad_reply_rejects_its_client_and_the_round_goes_on(case):
    spoil, reason = BAD_REPLIES[case]
    federation, defended = Federation(spoil={2: spoil}), strategy()
    result = run(defended, federation, num_rounds=2, evaluate=0.0)
    assert list(defended.result.rejected) == [2]
    assert reason in defended.result.rejected[2]
    state, others = network().state_dict(), [client for client in federation.clients if client.k != 2]
    for _ in range(2):
        state, _ = expected(state, others)
    assert_same_state(result.arrays.to_torch_state_dict(), state)
    assert result.train_metrics_clientapp[2]["num-rejected"] == 1


def test_strange_metrics_hurt_nobody_else():
    spoil = {
        0: edit("metrics", lambda r: r.update({"loss": [1.0, 2.0]})),
        1: edit("metrics", lambda r: r.update({"num-examples": float("inf")})),
        2: lambda reply, message: Message(RecordDict(), reply_to=message),
    }

    def evaluation(reply, message):
        return (
            spoil[reply.metadata.src_node_id](reply, message)
            if "metrics" in reply.content
            else no_arrays(reply, message)
        )

    result = run(strategy(FedAvg()), Federation(spoil=dict.fromkeys(spoil, evaluation)), evaluate=1.0)
    weights = [0, 0, 0, *COUNTS[3:]]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(np.average(range(K), weights=weights))
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(2.0)


def test_nobody_left_keeps_the_model():
    bad = dict.fromkeys(range(K), edit("fisher", None))
    defended = strategy()
    result = run(defended, Federation(spoil=bad), num_rounds=2)
    assert len(defended.result.rejected) == K
    assert not result.arrays
    assert strategy().aggregate_train(1, []) == (None, None)
