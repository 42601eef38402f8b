"""Modules that were elsewhere until 0.2.0: under their old names they give what they held, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PLACES = {
    "importance": "fisher.diagonal",
    "importance.capture": "fisher.graph.capture",
    "importance.cells": "fisher.layers.cells",
    "importance.check": "fisher.check",
    "importance.data": "fisher.data",
    "importance.entries": "fisher.graph.entries",
    "importance.estimate": "fisher.estimate",
    "importance.fisher": "fisher.diagonal",
    "importance.graph": "fisher.graph.autograd fisher.graph.gradients",
    "importance.hooks": "fisher.model.hooks",
    "importance.kinds": "fisher.kinds",
    "importance.losses": "fisher.losses",
    "importance.model": "fisher.model.inventory",
    "importance.modes": "fisher.model.modes",
    "importance.per_sample": "fisher.per_sample",
    "importance.provenance": "fisher.graph.provenance",
    "importance.recurrent": "fisher.layers.recurrent",
    "importance.rules": "fisher.layers",
    "importance.rules.convolution": "fisher.layers.convolution",
    "importance.rules.embedding": "fisher.layers.embedding",
    "importance.rules.linear": "fisher.layers.linear",
    "importance.rules.norm": "fisher.layers.norm",
    "importance.rules.table": "fisher.layers.table",
    "importance.settings": "fisher.model.settings",
    "importance.snapshot": "fisher.model.snapshot",
    "importance.stateless": "fisher.model.stateless",
    "importance.switches": "fisher.model.switches",
    "importance.values": "fisher.model.values",
    "importance.workarounds": "fisher.model.workarounds",
    "ops.network_reference": "ops.networks",
    "ops.network_schemas": "ops.networks",
    "ops.schemas": "ops ops.operator",
    "server": "rules.base",
    "server.blocks": "round.blocks",
    "server.borrowed": "store.borrowed_rows",
    "server.buffers": "state_dicts.buffers",
    "server.cluster": "rules.fdcr.clustering",
    "server.coalition": "rules.coalition",
    "server.coalition.rule": "rules.coalition.rule",
    "server.coalition.search": "rules.coalition.search",
    "server.coalition.state": "rules.coalition.state",
    "server.coalition.views": "rules.coalition.views",
    "server.columns": "round.columns",
    "server.defenses": "rules.table rules.pairwise.foolsgold rules.server_options",
    "server.defenses.byzantine": "rules.byzantine",
    "server.defenses.comparison": "rules.pairwise.comparison rules.valid_clients",
    "server.defenses.coordinatewise": "rules.table",
    "server.defenses.dnc": "rules.pairwise.dnc",
    "server.defenses.flame": "rules.pairwise.flame",
    "server.defenses.foolsgold": "rules.pairwise.foolsgold",
    "server.defenses.geometric_median": "rules.pairwise.geometric_median",
    "server.defenses.krum": "rules.pairwise.krum rules.pairwise.bulyan",
    "server.defenses.multi_metrics": "rules.pairwise.multi_metrics",
    "server.defenses.noise": "rules.crfl",
    "server.defenses.server_data": "rules.table rules.server_options",
    "server.fdcr": "rules.fdcr.rule",
    "server.fedavg": "rules.fedavg",
    "server.file_format": "store.file.format",
    "server.file_rows": "store.file.rows",
    "server.file_tiles": "store.file.tiles store.store_tiles",
    "server.gram": "rules.pairwise.gram",
    "server.intake": "round.client_updates round.screening round.arguments round.shares",
    "server.joined": "distributed.joined",
    "server.options": "rules.options",
    "server.passes": "round.readings",
    "server.pinned": "store.pinned_rows",
    "server.randomness": "rules.randomness",
    "server.row_writer": "store.row_writer",
    "server.rows": "store.rows store.attendance store.memory_rows memory",
    "server.rules": "rules.base rules.result round.screening",
    "server.scores": "rules.fdcr.discrepancy",
    "server.sharded": "distributed.param_shard",
    "server.shared_memory": "store.shared_memory",
    "server.shares": "round.shares",
    "server.state_dicts": "state_dicts.aggregate",
    "server.state_store": "state_dicts.state_store state_dicts.entries",
    "server.store": "store.update_store store.rows",
    "server.tiles": "round.tiles round.shard",
    "server.tiles_view": "round.tiles_view",
    "server.transfer": "round.vectors",
    "server.vectors": "store.upload",
    "sim.across_ranks": "sim.execution.ranks sim.execution.across_ranks",
    "sim.attackers": "sim.clients.attackers",
    "sim.checkpoint": "sim.run.folder sim.run.result",
    "sim.classifier": "sim.training.classifier sim.training.sgd sim.training.network",
    "sim.data": "sim.datasets.readers sim.datasets.dataset",
    "sim.ending": "sim.run.ending",
    "sim.evaluation": "sim.run.evaluation",
    "sim.federation": "sim.run.simulation sim.run.federation sim.run.result",
    "sim.figures": "sim.run.figures",
    "sim.forkserver": "sim.execution.forkserver",
    "sim.metrics": "sim.run.metrics sim.run.records sim.run.evaluation sim.similarity sim.costs",
    "sim.models": "sim.training.models",
    "sim.participation": "sim.clients.participation",
    "sim.partition": "sim.datasets.splits sim.datasets.partition",
    "sim.report": "sim.run.report",
    "sim.stacked": "sim.training.stacked_model sim.execution.stacked",
    "sim.workers": "sim.execution.worker_pool",
}
_PREFIX = f"{__package__}."


class _Moved(ModuleType):
    """An old name, whose attributes are looked for where they are now."""

    def __getattr__(self, name: str) -> Any:
        for place in () if name.startswith("__") else _places(self.__name__):
            if hasattr(module := import_module(place), name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """The last one that is asked: finds old names only, and only where nothing else has such a name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.removeprefix(_PREFIX) not in _PLACES or not fullname.startswith(_PREFIX):
            return None
        return ModuleSpec(
            fullname, self, is_package=any(_PREFIX + old.rpartition(".")[0] == fullname for old in _PLACES)
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        now = " and ".join(_places(module.__name__))
        warnings.warn(f"{module.__name__} is now {now}", DeprecationWarning, stacklevel=2)


def _places(old: str) -> list[str]:
    return [_PREFIX + place for place in _PLACES[old.removeprefix(_PREFIX)].split()]


sys.meta_path.append(_Finder())
