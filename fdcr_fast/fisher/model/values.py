"""The tensors that stand for a model's parameters and buffers while it is called, whatever it does to them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fdcr_fast.fisher.model.inventory import Inventory

# Models whose forward passes were seen to leave their parameters alone, so that they need no copies of these, and to
# write to buffers, if at all, by operations that count as versions; with the settings that they had then.
_reading: WeakKeyDictionary[nn.Module, Hashable] = WeakKeyDictionary()


class Values:
    """Parameters and buffers that forward passes may write to, and that are then put back to what they were.

    Buffers are copies. Parameters, which may be large, are copies until a forward pass has shown that it only reads
    them, and where they cannot be used as they are.

    Args:
        inventory: The model's.
        values: Their values by their first names.

    Attributes:
        params: The parameters by name.
        buffers: The buffers by name.
    """

    def __init__(self, inventory: Inventory, values: Mapping[str, Tensor]) -> None:
        self._inventory = inventory
        names = inventory.parameters.keys()
        shortened = _shortened(inventory)
        self._shortened_for_others = not shortened.isdisjoint(inventory.shared) if shortened else False
        self._seen = _reading.get(inventory.model) == inventory.settings
        self._copies = {
            name: _Copy(x)
            for name, x in values.items()
            if name not in names or not self._seen or name in shortened or x.is_inference()
        }
        tensors = {
            name: self._copies[name].tensor if name in self._copies else x.detach() for name, x in values.items()
        }
        self.params = {name: x for name, x in tensors.items() if name in names}
        self.buffers = {name: x for name, x in tensors.items() if name not in names}
        # What passes may not write to without consequences, with the versions that say whether they did.
        self._read = {name: x._version for name, x in self.params.items() if name not in shortened}
        self._writes = False

    def look(self) -> None:
        """Notes after a forward pass, of which the first shows it, what the model does to its parameters."""
        if self._seen:
            return
        self._seen = True
        written = [name for name, copy in self._copies.items() if copy.differs()]
        silently = [name for name in written if name in self.buffers and not self._copies[name].changed]
        self._writes = bool(silently) or not self._read.keys().isdisjoint(written)
        if not self._writes:
            _reading[self._inventory.model] = self._inventory.settings

    def join_samples(self) -> bool:
        """Whether a forward pass wrote what samples behind it in the batch may have read."""
        buffers = (self._copies[name] for name, x in self.buffers.items() if x.is_floating_point())
        return self._writes or self._shortened_for_others or any(copy.changed for copy in buffers)

    def restore(self) -> None:
        """Puts back what was written.

        Raises:
            ValueError: To parameters that were thought to be only read, so that there are no copies.
        """
        written = [name for name, version in self._read.items() if self.params[name]._version != version]
        for copy in self._copies.values():
            copy.restore(always=self._writes)
        for name in written:
            self._read[name] = self.params[name]._version
        if written and self._seen and not self._writes:
            self._writes = True
            _reading.pop(self._inventory.model, None)
            if lost := [name for name in written if name not in self._copies]:
                raise ValueError(f"the forward pass has written to {', '.join(lost)}, and never before: call again")


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same values, NaN for NaN."""
    return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


class _Copy:
    """A copy of a tensor that can be made again."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self.tensor = source.detach().clone()
        self._version = self.tensor._version

    @property
    def changed(self) -> bool:
        return self.tensor._version != self._version

    def differs(self) -> bool:
        """Whether it was changed, also by ways that do not count as versions, such as ``x.data.clamp_()``."""
        return self.changed or not same_values(self.tensor, self._source)

    def restore(self, *, always: bool) -> None:
        if always or self.changed:
            with torch.no_grad():
                self.tensor.resize_(self._source.shape).copy_(self._source)
            self._version = self.tensor._version


def _shortened(inventory: Inventory) -> set[str]:
    """The weights of embeddings with ``max_norm``, whose rows are shortened when they are looked up."""
    weights = [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in inventory.modules.items()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    return {first for name in weights if (first := inventory.find(name)) is not None}
