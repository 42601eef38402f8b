"""NVIDIA FLARE: an aggregator for its FedAvg controller, and the result that its clients send.

recipe = FedAvgRecipe(..., aggregator=FDCRAggregator("CoalitionFDCR"))     # job
flare.send(train_result(model, fisher, len(images)))                       # client script
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.rules.table import rule_named
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.store.upload import shown

try:
    from nvflare.apis.dxo import from_shareable
    from nvflare.apis.fl_constant import FLMetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
except ImportError as error:
    raise ImportError("fdcr_fast.integrations.nvflare needs NVFlare 2.9: pip install 'fdcr_fast[nvflare]'") from error

FISHER = "fisher"
NUM_SAMPLES = FLMetaKey.NUM_STEPS_CURRENT_ROUND  # by which NVFlare's own FedAvg weights


def train_result(
    model: nn.Module,
    fisher: Tensor | None,
    num_samples: int,
    metrics: Mapping[str, float] | None = None,
) -> FLModel:
    """What a client sends after training: its state, and in ``meta`` its Fisher and sample count.

    Args:
        model: As trained.
        fisher: Diagonal Fisher ``[P]`` of the client's data at the trained model, as
            :func:`fdcr_fast.diagonal_fisher` returns it; None under rules that need none.
        num_samples: ``n_k``.
        metrics: Of the trained model.
    """
    meta: dict[str, Any] = {NUM_SAMPLES: num_samples}
    if fisher is not None:
        named = ParamLayout.from_module(model).unflatten(fisher.cpu())
        meta[FISHER] = {name: value.numpy() for name, value in named.items()}
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return FLModel(params=state, params_type=ParamsType.FULL, metrics=dict(metrics or {}), meta=meta)


class FDCRAggregator(ModelAggregator):
    """An aggregator for NVFlare's FedAvg: results go into a store as they arrive, and a rule makes the new model.

    A result holds, as :func:`train_result` writes it, the client's state (or its difference to the global one,
    ``ParamsType.DIFF``), and in ``meta`` the diagonal Fisher by parameter name and the sample count. One that cannot
    be used rejects its client with a reason. What was taken in is not kept elsewhere. The global state is read from
    the tasks that NVFlare sends out; in a controller that sends none, call :meth:`start_round`.

    Args:
        rule: Name of a rule's class in ``fdcr_fast``, or of a row of ``fdcr_fast.rules.table.RULES``, as job files need
            it, or a rule. One that remembers earlier rounds does so by client name.
        options: Of the rule, if it is given by name.
        max_clients: Largest number of clients in a round; memory is reserved for so many.
        layout: Which entries are parameters; by default all of floating point but BatchNorm's running statistics and
            masks. In job files shapes by name, ``{"0.weight": [3, 2]}``.

    Attributes:
        result: What the rule did in the last round, of type :class:`fdcr_fast.AggregationResult`; None before.

    Raises:
        ValueError: there is no such rule.
    """

    def __init__(
        self,
        rule: str | AggregationRule = "FDCR",
        options: dict[str, Any] | None = None,
        max_clients: int = 100,
        layout: Mapping[str, Sequence[int]] | ParamLayout | None = None,
    ) -> None:
        super().__init__()
        self.rule, self.options, self.max_clients, self.layout = rule, options, max_clients, layout  # for job files
        self.result: AggregationResult | None = None
        self._rule = rule if isinstance(rule, AggregationRule) else rule_named(rule, options or {})
        if isinstance(layout, Mapping):
            layout = ParamLayout(tuple(layout), tuple(map(tuple, layout.values())))
        self._layout = layout
        self._lock = threading.Lock()
        self._sent: Mapping[str, Any] | None = None
        self._store: StateStore | None = None
        self._open = False
        self._metrics: dict[Hashable, tuple[Mapping[str, Any] | None, Any]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Note the global state when it is sent to clients."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            task = fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)
            if task is not None:
                self.start_round(from_shareable(task).data)

    def start_round(self, params: Mapping[str, Any]) -> None:
        """The global state that clients start from."""
        self._sent = params

    def reset_stats(self) -> None:
        """Forget the round."""
        with self._lock:
            self._open = False
            self._metrics = {}

    def accept_model(self, model: FLModel) -> None:
        """Take in one client's result, or reject its client."""
        client = model.meta.get("client_name", "?")
        store = self._opened()
        try:
            state = {name: _loaded(value) for name, value in model.params.items()}
            fisher, count = model.meta.get(FISHER), model.meta.get(NUM_SAMPLES)
            put = store.put_update if model.params_type == ParamsType.DIFF else store.put_state
            accepted = put(state, fisher, count, client)
        except Exception as error:  # the result is the client's, and so is whatever it raises
            store.reject(client, shown(error, str))
        else:
            if accepted:
                self._metrics[client] = (model.metrics, count)
        if client in store.rejected:
            self.warning(f"rejected {client}: {store.rejected[client]}")

    def aggregate_model(self) -> FLModel:
        """The rule's new global state, as a full model, and the mean of the kept clients' metrics."""
        state, result = self._opened().aggregate(self._rule, on_empty="keep")  # warns; a job goes on
        self.result = result
        self._open = False
        kept = result.kept_clients
        self.info(f"kept {kept}, dropped {len(result.dropped_clients)}, rejected {len(result.rejected)}")
        return FLModel(params=state, params_type=ParamsType.FULL, metrics=self._mean_metrics(kept))

    def _opened(self) -> StateStore:
        """The round's store, made or cleared when it is first asked for."""
        with self._lock:
            if self._open and self._store is not None:
                return self._store
            if self._sent is None:
                raise RuntimeError("the global state is not known: no training task was sent, nor start_round called")
            sent = {name: np.asarray(v) if np.isscalar(v) else v for name, v in self._sent.items()}
            if self._store is None:
                with_fishers = self._rule.needs_fishers
                self._store = StateStore(sent, self.max_clients, layout=self._layout, with_fishers=with_fishers)
            else:
                self._store.clear(sent)
            self._open = True
            return self._store

    def _mean_metrics(self, kept: list[Hashable]) -> dict[str, Any] | None:
        helper = WeightedAggregationHelper()
        for client in kept:
            metrics, count = self._metrics[client]
            numbers = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, int | float)}
            if numbers:
                helper.add(numbers, float(count), client, 0)
        mean: dict[str, Any] = helper.get_result()
        return mean or None


def _loaded(value: Any) -> Any:
    """A value that NVFlare left on disk (``enable_tensor_disk_offload``), or the value itself."""
    materialize = getattr(value, "materialize", None)
    return value if materialize is None else materialize()
