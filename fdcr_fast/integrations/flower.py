"""Flower's message API: a strategy that defends, and the reply that its clients send.

strategy = FDCRStrategy(CoalitionFDCR())                       # ServerApp
return train_reply(msg, model, fisher, len(images))            # ClientApp, @app.train()
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fdcr_fast.integrations.npy import npy_tensor
from fdcr_fast.layout import ParamLayout
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.store.upload import shown

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    raise ImportError("fdcr_fast.integrations.flower needs Flower 1.40: pip install 'fdcr_fast[flower]'") from error

ARRAYS, UPDATE, FISHER, METRICS, NUM_EXAMPLES = "arrays", "update", "fisher", "metrics", "num-examples"

_MOST_EXAMPLES = 1e100  # sums of counts below it do not overflow
_LOG = logging.getLogger("flwr")


def train_reply(
    message: Message,
    model: nn.Module,
    fisher: Tensor | Mapping[str, Tensor] | None,
    num_examples: int,
    metrics: Mapping[str, Any] | None = None,
    *,
    difference: bool = False,
) -> Message:
    """What a client answers to a training message: its model, its Fisher, its metrics.

    Args:
        message: The one that the client got; with ``difference`` its record ``"arrays"`` must be the global state.
        model: As trained.
        fisher: Diagonal Fisher of the client's data at the trained model: what :func:`fdcr_fast.diagonal_fisher`
            returns, ``[P]``, or a mapping by parameter name; None under rules that need none.
        num_examples: ``n_k``.
        metrics: More for the record ``"metrics"``, numbers or lists of numbers.
        difference: Send the record ``"update"``, the state minus the global one, instead of ``"arrays"``, the state.
            The server then copies the received bytes straight into its store.
    """
    state = model.state_dict()
    if difference:
        own = message.content[ARRAYS].to_torch_state_dict()
        state = {name: value.cpu() - own[name] for name, value in state.items()}
    content = RecordDict({UPDATE if difference else ARRAYS: ArrayRecord(state)})
    if isinstance(fisher, Tensor):
        fisher = ParamLayout.from_module(model).unflatten(fisher)
    if fisher is not None:
        content[FISHER] = ArrayRecord(dict(fisher))
    content[METRICS] = MetricRecord({NUM_EXAMPLES: num_examples, **(metrics or {})})
    return Message(content=content, reply_to=message)


class FDCRStrategy(FedAvg):
    """Flower's ``FedAvg`` with another aggregation: replies go into a store, and a rule makes the new model of them.

    A reply holds, as :func:`train_reply` writes it, an ArrayRecord ``"arrays"`` with the client's state (under
    ``arrayrecord_key``) or ``"update"`` with its difference to the global one, an ArrayRecord ``"fisher"`` with the
    diagonal Fisher by parameter name (or as one flat array), and a MetricRecord with ``weighted_by_key``. A reply that
    cannot be used rejects its client with a reason, whatever is in it. The client ids of the result are node ids.

    Metrics are averaged over the kept clients whose metrics have the form that most have; ``num-kept``,
    ``num-dropped`` and ``num-rejected`` are added to those of training.

    Args:
        rule: By default :class:`fdcr_fast.FDCR`. One that remembers earlier rounds does so by node id.
        layout: Which arrays are parameters; by default all of floating point but BatchNorm's running statistics.
        **fedavg: See ``flwr.serverapp.strategy.FedAvg``.

    Attributes:
        result: What the rule did in the last round, of type :class:`fdcr_fast.AggregationResult`; None before.
    """

    def __init__(
        self, rule: AggregationRule | None = None, *, layout: ParamLayout | None = None, **fedavg: Any
    ) -> None:
        super().__init__(**fedavg)
        self.rule = FDCR() if rule is None else rule
        self.layout = layout
        self.result: AggregationResult | None = None
        self._sent: ArrayRecord | None = None
        self._store: StateStore | None = None

    def summary(self) -> None:
        """Log the rule, and what ``FedAvg`` logs."""
        super().summary()
        _LOG.info("\t└──> Rule: %r", self.rule)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As ``FedAvg``; keeps the global state, from which updates are measured."""
        self._sent = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rule's new global state, None if nobody was kept, and the metrics of the kept clients."""
        received = {reply.metadata.src_node_id: reply for reply in replies}
        if not received:
            return None, None
        store = self._empty_store(len(received))
        for node, reply in received.items():
            self._put(store, node, reply)
        state, result = store.aggregate(self.rule, on_empty="keep")  # warns; a run goes on
        self.result = result
        kept = result.kept_clients
        for node, reason in result.rejected.items():
            _LOG.info("aggregate_train: rejected node %s: %s", node, reason)
        metrics = self._mean_metrics([received[node] for node in kept], self.train_metrics_aggr_fn) or MetricRecord()
        metrics["num-kept"], metrics["num-rejected"] = len(kept), len(result.rejected)
        metrics["num-dropped"] = len(result.dropped_clients)
        return ArrayRecord(state) if kept else None, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean of the metrics; a reply that cannot be used is left out."""
        return self._mean_metrics(replies, self.evaluate_metrics_aggr_fn)

    def _empty_store(self, capacity: int) -> StateStore:
        if self._sent is None:
            raise RuntimeError("aggregate_train was called before configure_train: the global state is not known")
        sent = {name: npy_tensor(array.data) for name, array in self._sent.items()}
        if self._store is None or self._store.updates.capacity < capacity:
            self._store = StateStore(sent, capacity, layout=self.layout, with_fishers=self.rule.needs_fishers)
        else:
            self._store.clear(sent)
        return self._store

    def _put(self, store: StateStore, node: int, reply: Message) -> None:
        try:
            content = _content(reply)
            key = UPDATE if UPDATE in content else self.arrayrecord_key
            state = _tensors(content, key)
            fisher: dict[str, Tensor] | Tensor | None = None
            if store.updates.with_fishers:
                fisher = _tensors(content, FISHER)
                if len(fisher) == 1 and not fisher.keys() & set(store.layout.names):
                    (fisher,) = fisher.values()
            count = _metrics(content, self.weighted_by_key)[self.weighted_by_key]
        except Exception as error:  # the reply is the client's, and so is whatever it raises
            store.reject(node, shown(error, str))
        else:
            put = store.put_update if key == UPDATE else store.put_state
            put(state, fisher, count, node)

    def _mean_metrics(
        self, replies: Iterable[Message], mean: Callable[[list[RecordDict], str], MetricRecord]
    ) -> MetricRecord | None:
        """Mean over the replies whose metrics have the most common names and lengths."""
        found = [metrics for reply in replies if (metrics := self._usable_metrics(reply)) is not None]
        if not found:
            return None
        forms = [frozenset((k, len(v) if isinstance(v, list) else None) for k, v in m.items()) for m in found]
        common = Counter(forms).most_common(1)[0][0]
        alike = [RecordDict({METRICS: m}) for m, form in zip(found, forms, strict=True) if form == common]
        return mean(alike, self.weighted_by_key)

    def _usable_metrics(self, reply: Message) -> MetricRecord | None:
        try:
            metrics = _metrics(_content(reply), self.weighted_by_key)
            if not 0 < float(metrics[self.weighted_by_key]) < _MOST_EXAMPLES:
                raise ValueError(f"{self.weighted_by_key} is {metrics[self.weighted_by_key]}")
        except Exception as error:  # as above
            _LOG.info("no metrics of node %s: %s", reply.metadata.src_node_id, shown(error, str))
            return None
        return metrics


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise ValueError(f"the reply is an error: {reply.error.reason}")
    return reply.content


def _tensors(content: RecordDict, key: str) -> dict[str, Tensor]:
    """The arrays of a record as tensors on the bytes that came in."""
    record = content.get(key)
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"the reply has no ArrayRecord {key!r}, only {', '.join(sorted(content)) or 'nothing'}")
    return {name: npy_tensor(array.data) for name, array in record.items()}


def _metrics(content: RecordDict, key: str) -> MetricRecord:
    """The first MetricRecord that has the key."""
    for record in content.values():
        if isinstance(record, MetricRecord) and key in record:
            return record
    raise ValueError(f"the reply has no MetricRecord with {key!r}")
