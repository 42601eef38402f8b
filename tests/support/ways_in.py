"""A round of clients, and every way in which the public interface takes it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from fdcr_fast import (
    AggregationResult,
    AggregationRule,
    ParamLayout,
    StateStore,
    UpdateStore,
    aggregate_state_dicts,
)


def on_grid(rng, *shape):
    """Numbers of which sums and differences of two are exact in float32: a state minus the global one is the update."""
    return torch.tensor(np.round(rng.normal(size=shape) * 2**12) / 2**12, dtype=torch.float32)


def plain():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


MODELS = {"plain": plain, "with BatchNorm": normed, "tied, with BatchNorm": tied}
IDS = {
    "integers": lambda k: 3 * k,
    "strings": lambda k: f"client {k}",
    "numpy integers": lambda k: np.int64(10 - k),
    "numpy strings": lambda k: np.str_(f"client {k}"),
    "tensors": lambda k: torch.tensor(7 + k),
}


@dataclasses.dataclass
class Upload:
    """What one client has to say, however it says it."""

    update: torch.Tensor
    fisher: torch.Tensor
    count: Any
    client: Any
    buffers: dict[str, torch.Tensor]


class Round:
    def __init__(self, seed: int, K: int, model: str = "plain", ids: str = "integers") -> None:
        rng = np.random.default_rng(seed)
        self.model = MODELS[model]()
        self.layout = ParamLayout.from_module(self.model)
        P = self.layout.numel
        state = self.model.state_dict()
        self.w = on_grid(rng, P)
        with torch.no_grad():
            for name, value in self.layout.unflatten(self.w).items():
                state[name].copy_(value)
            self.buffers = [name for name, _ in self.model.named_buffers()]
            for name in self.buffers:
                state[name].copy_(on_grid(rng, *state[name].shape).abs() + 3)
        common, spread = on_grid(rng, P), 2.0 ** rng.integers(-1, 2, K)
        self.uploads = [
            Upload(
                (common + on_grid(rng, P) * spread[k]) / 8,
                torch.from_numpy(rng.lognormal(0, 2, P)).float(),
                int(rng.integers(1, 100)),
                IDS[ids](k),
                {
                    name: state[name] + (on_grid(rng, *state[name].shape) * 2).abs().to(state[name].dtype)
                    for name in self.buffers
                },
            )
            for k in range(K)
        ]

    def without(self, row: int) -> Round:
        others = copy.copy(self)
        others.uploads = [upload for k, upload in enumerate(self.uploads) if k != row]
        return others

    def arguments(self) -> dict[str, Any]:
        return {
            "global_params": self.w.clone(),
            "updates": torch.stack([upload.update for upload in self.uploads]),
            "fishers": torch.stack([upload.fisher for upload in self.uploads]),
            "num_samples": [upload.count for upload in self.uploads],
            "client_ids": [upload.client for upload in self.uploads],
        }

    def aggregate(self, rule: AggregationRule, **options: Any) -> AggregationResult:
        return rule.aggregate(**{**self.arguments(), **options})

    def named(self, vector: torch.Tensor, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the keys and the order of a state dict, where what is tied comes under each of its names."""
        found = {**self.layout.unflatten(vector.clone()), **buffers}
        found |= {name: found[first].clone() for name, first in self.layout.tied}
        return {name: found[name] for name in self.model.state_dict() if name in found}

    def state(self, upload: Upload) -> dict[str, torch.Tensor]:
        return self.named(self.w + upload.update, upload.buffers)

    def difference(self, upload: Upload) -> dict[str, torch.Tensor]:
        sent = self.model.state_dict()
        return self.named(upload.update, {name: value - sent[name] for name, value in upload.buffers.items()})

    def module(self, upload: Upload) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.state(upload))
        return model


class Exporter:
    """What another library's tensors look like."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector

    def __dlpack__(self, **options: Any) -> Any:
        return self.vector.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.vector.__dlpack_device__()


# Forms of a vector: what any of them says is the same.
VECTORS = {
    "tensor": lambda x: x,
    "every other number": lambda x: torch.stack([x, -x], 1)[:, 0],
    "float64": lambda x: x.double(),
    "with gradient": lambda x: x.clone().requires_grad_(),
    "array": lambda x: x.numpy(),
    "array backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "big-endian array": lambda x: x.numpy().astype(">f4"),
}
BUFFERS = {"dlpack": Exporter, "bytes": lambda x: x.numpy().tobytes(), "memoryview": lambda x: memoryview(x.numpy())}
# Forms of a mapping by name.
MAPPINGS = {
    "mapping": lambda x: x,
    "arrays by name": lambda x: {name: value.numpy() for name, value in x.items()},
    "in another order": lambda x: dict(reversed(x.items())),
    "module.": lambda x: {f"module.{name}": value for name, value in x.items()},
    "_orig_mod.": lambda x: {f"_orig_mod.{name}": value for name, value in x.items()},
    "with more": lambda x: {"epoch": torch.tensor(3.0), **x, "optimizer": "SGD"},
}
SEQUENCES = {
    "sequence": lambda x: x,
    "tuple of arrays": lambda x: tuple(value.numpy() for value in x),
}
FISHERS = [*VECTORS, *MAPPINGS, *SEQUENCES]


def vector_in(form: str, round: Round, vector: torch.Tensor) -> Any:
    """A vector in any form; of mappings without buffers."""
    if form in MAPPINGS:
        return MAPPINGS[form](dict(round.layout.unflatten(vector.clone())))
    if form in SEQUENCES:
        return SEQUENCES[form](list(round.layout.unflatten(vector.clone()).values()))
    return {**VECTORS, **BUFFERS}[form](vector.clone())


def state_in(form: str, round: Round, upload: Upload) -> Any:
    if form in MAPPINGS:
        return MAPPINGS[form](round.state(upload))
    if form == "module":
        return round.module(upload)
    return vector_in(form, round, round.w + upload.update)


def difference_in(form: str, round: Round, upload: Upload) -> Any:
    if form in MAPPINGS:
        return MAPPINGS[form](round.difference(upload))
    return vector_in("mapping" if form == "only parameters" else form, round, upload.update)


def update_in(form: str, round: Round, upload: Upload) -> Any:
    return vector_in(form, round, upload.update)


@dataclasses.dataclass
class Outcome:
    params: torch.Tensor
    result: AggregationResult
    state: dict[str, Any] | None = None
    """Of those ways in that give one."""


@dataclasses.dataclass
class Sent:
    """An upload as a way in takes it: its model (update or state), Fisher, sample count and client id."""

    model: Any
    fisher: Any
    count: Any
    client: Any


@dataclasses.dataclass(frozen=True)
class Way:
    """``aggregate(round, rule, sent, folder, **options)`` of uploads in the forms that it takes."""

    aggregate: Any
    model: Any
    forms: tuple[str, ...]
    fishers: tuple[str, ...] = tuple(FISHERS)

    def send(self, round: Round, upload: Upload, form: str, fisher: str) -> Sent:
        model = self.model(form, round, upload)
        return Sent(model, vector_in(fisher, round, upload.fisher), upload.count, upload.client)


def carries_buffers(way: Way, form: str) -> bool:
    return way.model is not update_in and form in (*MAPPINGS, "module")


def by_list(round: Round, rule: AggregationRule, sent: list[Sent], folder: Any, **options: Any) -> Outcome:
    columns = [[getattr(s, field) for s in sent] for field in ("model", "fisher", "count", "client")]
    result = rule.aggregate(round.w.clone(), *columns[:3], client_ids=columns[3], **options)
    return Outcome(result.params, result)


def by_update_store(round: Round, rule: AggregationRule, sent: list[Sent], folder: Any, **options: Any) -> Outcome:
    store = UpdateStore(round.layout, len(sent))
    for s in sent:
        store.put(s.model, s.fisher, s.count, s.client)
    result = rule.aggregate(round.w.clone(), store, **options)
    return Outcome(result.params, result)


def by_file(round: Round, rule: AggregationRule, sent: list[Sent], folder: Any, **options: Any) -> Outcome:
    path = folder / "round.store"
    path.unlink(missing_ok=True)
    with_room = {"path": path, "max_resident": 1 << 20, "sync": False}
    store = UpdateStore(round.layout, len(sent), tile=8, **with_room)
    for s in sent:
        store.put(s.model, s.fisher, s.count, s.client)
    rejected = store.rejected  # which is not written down
    store.close()
    store = UpdateStore.open(path)
    result = rule.aggregate(round.w.clone(), store, **options)
    store.close()
    return Outcome(result.params, dataclasses.replace(result, rejected={**rejected, **result.rejected}))


def by_state_store(put: str, **options: Any) -> Any:
    def aggregate(round: Round, rule: AggregationRule, sent: list[Sent], folder: Any, **how: Any) -> Outcome:
        store = StateStore(round.model, len(sent))
        for s in sent:
            getattr(store, put)(s.model, s.fisher, s.count, s.client, **options)
        state, result = store.aggregate(rule, **how)
        return Outcome(round.layout.flatten(state), result, state)

    return aggregate


def by_state_dicts(form: Any) -> Any:
    def aggregate(round: Round, rule: AggregationRule, sent: list[Sent], folder: Any, **how: Any) -> Outcome:
        arguments = form(round, sent)
        state, result = aggregate_state_dicts(**arguments, rule=rule, return_result=True, **how)
        return Outcome(round.layout.flatten(state), result, state)

    return aggregate


def in_sequences(round: Round, sent: list[Sent]) -> dict[str, Any]:
    return {
        "global_state": round.model,
        "client_states": [s.model for s in sent],
        "fishers": [s.fisher for s in sent],
        "num_samples": [s.count for s in sent],
        "client_ids": [s.client for s in sent],
    }


def in_mappings(round: Round, sent: list[Sent]) -> dict[str, Any]:
    return {
        "global_state": round.model.state_dict(),
        "layout": round.layout,
        "client_states": {s.client: s.model for s in sent},
        "fishers": {s.client: s.fisher for s in reversed(sent)},
        "num_samples": {s.client: s.count for s in sent},
    }


UPDATES = (*VECTORS, *BUFFERS, *MAPPINGS, *SEQUENCES)
STATES = (*MAPPINGS, "module")
WAYS = {
    "lists": Way(by_list, update_in, tuple(VECTORS), tuple(VECTORS)),
    "UpdateStore": Way(by_update_store, update_in, UPDATES, UPDATES),
    "UpdateStore in a file": Way(by_file, update_in, UPDATES, UPDATES),
    "put_state": Way(by_state_store("put_state"), state_in, (*STATES, *VECTORS, *SEQUENCES)),
    "put_update": Way(
        by_state_store("put_update"), difference_in, (*MAPPINGS, *VECTORS, *SEQUENCES, "only parameters")
    ),
    "put(difference=True)": Way(
        by_state_store("put", difference=True), difference_in, (*MAPPINGS, *VECTORS, *SEQUENCES)
    ),
    "sequences of states": Way(by_state_dicts(in_sequences), state_in, STATES),
    "states by client": Way(by_state_dicts(in_mappings), state_in, STATES),
}
