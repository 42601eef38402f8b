"""The modes of a model's modules in which it is called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdcr_fast.fisher.model import workarounds
from fdcr_fast.fisher.model.inventory import Inventory
from fdcr_fast.fisher.model.snapshot import Snapshot
from fdcr_fast.fisher.model.values import same_values

_holders: dict[nn.Module, int] = {}  # the threads that call these modules now
_released = threading.Condition()


@contextmanager
def one_thread_at_a_time(model: nn.Module) -> Iterator[None]:
    """A context for one thread per module; others wait, as values and modes are exchanged while it is called."""
    modules, own = list(model.modules()), threading.get_ident()
    with _released:
        _released.wait_for(lambda: all(_holders.get(module, own) == own for module in modules))
        taken = [module for module in modules if module not in _holders]
        _holders.update(dict.fromkeys(taken, own))
    try:
        yield
    finally:
        with _released:
            for module in taken:
                del _holders[module]
            _released.notify_all()


@contextmanager
def evaluation(inventory: Inventory, eval_mode: bool) -> Iterator[None]:
    """A context with the modes wanted, which are put back at the end.

    Raises:
        ValueError: ``eval()`` writes to parameters or buffers, or a layer normalises with the statistics of the batch.
    """
    modules = inventory.modules.values()
    before = {module: module.training for module in modules}
    own_ways = eval_mode and any(map(_has_own_way, modules))
    attributes = Snapshot.of_attributes(inventory) if own_ways else None
    try:
        if own_ways:
            _eval_without_writing(inventory)
        elif eval_mode:
            inventory.model.eval()
        _refuse_batch_statistics(inventory)
        with workarounds.evaluation():
            yield
    finally:
        for module, training in before.items():
            module.training = training
        if attributes is not None:
            attributes.restore()


def _has_own_way(module: nn.Module) -> bool:
    """Whether its class or the module itself says what happens when its mode changes."""
    own = type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
    return own or not vars(module).keys().isdisjoint(("train", "eval"))


def _eval_without_writing(inventory: Inventory) -> None:
    """Calls ``eval()``, which must not write: layers of low rank may merge their weights into those of the caller."""
    tensors = {**inventory.parameters, **inventory.buffers}
    values = {name: x.detach().clone() for name, x in tensors.items()}
    registries = Snapshot.of_registries(inventory)
    inventory.model.eval()
    exchanged = {name for registry, leaf, name in inventory.slots if registry.get(leaf) is not tensors[name]}
    registries.restore()
    with torch.no_grad():
        written = {name for name, x in tensors.items() if not same_values(x, values[name])}
        for name in written:
            tensors[name].copy_(values[name])
    if changed := sorted(exchanged | written):
        raise ValueError(
            f"the model's eval() changes {', '.join(changed)}: the Fisher would be that of other parameters; "
            "bring the model into the mode that you want and pass eval_mode=False"
        )


def _refuse_batch_statistics(inventory: Inventory) -> None:
    for name, module in inventory.modules.items():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name} normalises with the statistics of the batch, so no sample has a gradient of its own: "
                "use running statistics in eval mode, or a normalisation within the sample (GroupNorm)"
            )
