"""Flower's older API of clients and ``aggregate_fit``: a strategy that defends, and what its clients return.

strategy = LegacyFDCRStrategy(FDCR(), names=list(model.state_dict()))      # ServerAppComponents(strategy=...)
return fit_result(model, fisher, len(images))                              # NumPyClient.fit
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fdcr_fast.integrations.npy import npy_tensor
from fdcr_fast.layout import ParamLayout
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.fdcr.rule import FDCR
from fdcr_fast.rules.result import AggregationResult
from fdcr_fast.state_dicts.state_store import StateStore
from fdcr_fast.store.upload import shown

try:
    from flwr.common import EvaluateRes, FitIns, FitRes, Parameters, ndarrays_to_parameters
    from flwr.server.client_manager import ClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.strategy import FedAvg
except ImportError as error:
    raise ImportError("fdcr_fast.integrations.flower_legacy needs Flower: pip install 'fdcr_fast[flower]'") from error

FISHER = "fisher"
_LOG = logging.getLogger("flwr")


def fit_result(
    model: nn.Module,
    fisher: Tensor | None,
    num_examples: int,
    metrics: Mapping[str, Any] | None = None,
) -> tuple[list[NDArray[Any]], int, dict[str, Any]]:
    """What ``NumPyClient.fit`` returns: the state, the sample count, and metrics with the Fisher as .npy bytes.

    Args:
        model: As trained; all entries of its state dict are sent, in order.
        fisher: Diagonal Fisher ``[P]`` of the client's data at the trained model, as
            :func:`fdcr_fast.diagonal_fisher` returns it; None under rules that need none.
        num_examples: ``n_k``.
        metrics: More numbers.
    """
    sent = dict(metrics or {})
    if fisher is not None:
        file = io.BytesIO()
        np.save(file, fisher.cpu().numpy(), allow_pickle=False)
        sent[FISHER] = file.getvalue()
    return [value.cpu().numpy() for value in model.state_dict().values()], num_examples, sent


class LegacyFDCRStrategy(FedAvg):
    """Flower's older ``FedAvg`` with another aggregation: results go into a store, and a rule makes the new model.

    A result holds, as :func:`fit_result` writes it, the arrays of the client's state, and its diagonal Fisher ``[P]``
    as .npy bytes in the metric ``"fisher"``. One that cannot be used rejects its client with a reason. The client ids
    of the result are those of Flower (``ClientProxy.cid``).

    Args:
        rule: By default :class:`fdcr_fast.FDCR`. One that remembers earlier rounds does so by client id.
        names: Of the arrays, ``list(model.state_dict())``, by which BatchNorm's statistics are recognised; by default
            numbers, and all floating-point arrays are parameters.
        layout: Which arrays are parameters, by name; by default all of floating point but BatchNorm's statistics.
        **fedavg: See ``flwr.server.strategy.FedAvg``.

    Attributes:
        result: What the rule did in the last round, of type :class:`fdcr_fast.AggregationResult`; None before.
    """

    def __init__(
        self,
        rule: AggregationRule | None = None,
        *,
        names: Sequence[str] | None = None,
        layout: ParamLayout | None = None,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.rule = FDCR() if rule is None else rule
        self.names = names
        self.layout = layout
        self.result: AggregationResult | None = None
        self._sent: Parameters | None = None

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """As ``FedAvg``; keeps the global state, from which updates are measured."""
        self._sent = parameters
        instructions: list[tuple[ClientProxy, FitIns]] = super().configure_fit(server_round, parameters, client_manager)
        return instructions

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Any]]:
        """The rule's new parameters, None if nobody was kept, and the metrics of the kept clients."""
        if not results or (failures and not self.accept_failures):
            return None, {}
        if self._sent is None:
            raise RuntimeError("aggregate_fit was called before configure_fit: the global state is not known")
        store = StateStore(
            self._state(self._sent), len(results), layout=self.layout, with_fishers=self.rule.needs_fishers
        )
        for proxy, answer in results:
            self._put(store, proxy.cid, answer)
        state, result = store.aggregate(self.rule, on_empty="keep")  # warns; a run goes on
        self.result = result
        for client, reason in result.rejected.items():
            _LOG.info("aggregate_fit: rejected client %s: %s", client, reason)
        kept = set(result.kept_clients)
        metrics = self._mean_metrics([answer for proxy, answer in results if proxy.cid in kept])
        if not kept:
            return None, metrics
        return ndarrays_to_parameters([value.cpu().numpy() for value in state.values()]), metrics

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Any]]:
        """As ``FedAvg`` over the results with examples and a finite loss."""
        usable = [(p, answer) for p, answer in results if answer.num_examples > 0 and math.isfinite(answer.loss)]
        aggregated: tuple[float | None, dict[str, Any]] = super().aggregate_evaluate(server_round, usable, failures)
        return aggregated

    def _put(self, store: StateStore, client: str, answer: FitRes) -> None:
        try:
            state = self._state(answer.parameters)
            fisher = npy_tensor(_fisher(answer)) if store.updates.with_fishers else None
        except Exception as error:  # the answer is the client's, and so is whatever it raises
            store.reject(client, shown(error, str))
        else:
            store.put_state(state, fisher, answer.num_examples, client)

    def _state(self, parameters: Parameters) -> dict[str, Tensor]:
        tensors = [npy_tensor(data) for data in parameters.tensors]
        names = [str(i) for i in range(len(tensors))] if self.names is None else self.names
        if len(names) != len(tensors):
            raise ValueError(f"expected {len(names)} arrays, got {len(tensors)}")
        return dict(zip(names, tensors, strict=True))

    def _mean_metrics(self, answers: list[FitRes]) -> dict[str, Any]:
        """What ``fit_metrics_aggregation_fn`` makes of the kept clients' metrics without their Fishers."""
        if not answers or self.fit_metrics_aggregation_fn is None:
            return {}
        metrics = [(a.num_examples, {k: v for k, v in a.metrics.items() if k != FISHER}) for a in answers]
        try:
            mean: dict[str, Any] = self.fit_metrics_aggregation_fn(metrics)
        except Exception as error:  # no client's metrics may end the run
            _LOG.warning("fit_metrics_aggregation_fn failed: %s", shown(error, repr))
            return {}
        return mean


def _fisher(answer: FitRes) -> bytes:
    fisher = answer.metrics.get(FISHER)
    if not isinstance(fisher, bytes):
        raise ValueError(f"the result has no Fisher: the metric {FISHER!r} is of type {type(fisher).__name__}")
    return fisher
