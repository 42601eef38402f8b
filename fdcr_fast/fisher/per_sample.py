"""Squared per-sample gradients of any parameters of any model: ``vmap(grad)``, or one sample at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from fdcr_fast.fisher.data import Batch
from fdcr_fast.fisher.graph.autograd import Graph
from fdcr_fast.fisher.losses import Loss, losses_of
from fdcr_fast.fisher.model.stateless import Stateless
from fdcr_fast.fisher.model.workarounds import vectorisation

_log = logging.getLogger("fdcr_fast")

# Per-sample gradients alive at one time.
_MAX_BYTES = 64 << 20


def plain_gradients(model: Stateless, loss: Loss, names: Collection[str], batch: Batch) -> dict[str, Tensor]:
    """The gradients of the summed losses by plain autograd, for those of ``names`` that the losses depend on."""
    inputs, targets = batch.private().tree()
    with _all_differentiable(model) as (leaves, call):
        losses = losses_of(loss, call(inputs), targets)
        wanted = [leaves[name] for name in names]
        grads: Iterable[Tensor | None] = ()
        if Graph(losses).opaque:  # such checkpoints support a backward pass to all parameters only
            losses.sum().backward()
            grads = [leaf.grad for leaf in wanted]
        elif losses.requires_grad:
            grads = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
    return {name: g.to_dense() for name, g in zip(names, grads, strict=False) if g is not None}


def hides_parameters(model: Stateless, loss: Callable[[Any, Any], Tensor], batch: Batch) -> bool:
    """Whether backward passes reach parameters in ways that the graph of the losses does not show.

    Such a way ends where gradients are accumulated, which ``grad()`` does not do, or refuses ``grad()``, or is one that
    ``grad()`` does not take, so that its gradients are not those of ``backward()``.
    """
    inputs, targets = batch.private().tree()
    reached: list[Tensor] = []
    with _all_differentiable(model) as (leaves, call):
        hooks = [leaf.register_post_accumulate_grad_hook(reached.append) for leaf in leaves.values()]
        losses = loss(call(inputs), targets)
        if not losses.requires_grad:
            return False
        try:
            shown = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
            if reached:
                return True
            for hook in hooks:
                hook.remove()
            losses.sum().backward()
        except RuntimeError as error:
            _log.info("one sample at a time: %s", error)
            return True
    return any(_other(leaf.grad, g) for leaf, g in zip(leaves.values(), shown, strict=True))


def _other(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two gradients differ by more than rounding."""
    if one is None or other is None:
        return one is not other
    one, other = one.to_dense(), other.to_dense()
    tolerance = max(1e-3, 64 * torch.finfo(one.dtype).eps)
    return not bool((one - other).norm() <= tolerance * one.norm())


@contextmanager
def _all_differentiable(model: Stateless) -> Iterator[tuple[dict[str, Tensor], Callable[[Any], Any]]]:
    leaves = model.leaves(name for name, p in model.params.items() if p.is_floating_point())
    for name, hooks in model.hooks.items():
        for hook in hooks:
            leaves[name].register_hook(hook)
    with model.at(leaves) as call:
        yield leaves, call


class PerSampleGradients:
    """The sums of squared per-sample gradients, of which no more than a chunk is stored at a time."""

    def __init__(self, model: Stateless) -> None:
        self._model = model
        self._vectorised = True

    def one_by_one(self) -> None:
        """Takes plain autograd from now on."""
        self._vectorised = False

    def sum_squares(self, loss: Loss, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """The sums ``sum_n grad_n^2`` in at least float32 for those of ``names`` that some sample's loss needs."""
        sums: dict[str, Tensor] = {}
        params = {name: self._model.params[name] for name in names}
        bytes_per_sample = sum(p.numel() * p.element_size() for p in params.values())
        step = max(1, _MAX_BYTES // max(1, bytes_per_sample))
        for start in range(0, batch.samples, step):
            part = batch.part(slice(start, start + step))
            grads = self._vectorised_gradients(loss, params, part)
            if grads is not None:
                _add_squares(sums, grads)
                continue
            for i in range(part.samples):
                of_one = plain_gradients(self._model, loss, names, part.part(slice(i, i + 1)))
                _add_squares(sums, {name: g.unsqueeze(0) for name, g in of_one.items()})
        return sums

    def _vectorised_gradients(self, loss: Loss, params: dict[str, Tensor], batch: Batch) -> dict[str, Tensor] | None:
        """Gradients of all samples ``[n, *shape]``, or None where ``vmap`` cannot do it."""
        if not self._vectorised or batch.has_lists or self._model.has_own_classes(params):
            return None
        private = batch.private()

        def sample_loss(params: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
            inputs, targets = private.with_tensors(x.unsqueeze(0) for x in tensors).tree()
            with self._model.at(params) as call:
                return losses_of(loss, call(inputs), targets).squeeze(0)

        try:
            with vectorisation(self._model.module):
                per_sample = vmap(grad(sample_loss), in_dims=(None, 0), randomness="different")
                grads: dict[str, Tensor] = per_sample(params, private.tensors)
            return grads
        except Exception as error:  # what vmap cannot do, it says in many ways; the loop finds real errors
            _log.info("vmap failed, one sample at a time instead: %s", error)
            self._vectorised = False
            return None
        finally:
            self._model.restore()


def _add_squares(sums: dict[str, Tensor], grads: Mapping[str, Tensor]) -> None:
    """Adds squared gradients, squared out of place: autograd may have given several parameters views of one tensor."""
    for name, g in grads.items():
        squares = g.to(torch.promote_types(g.dtype, torch.float32)).square().sum(0)
        sums[name] = sums[name].add_(squares) if name in sums else squares
