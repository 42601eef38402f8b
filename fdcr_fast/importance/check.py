"""The fast way against plain autograd, on one sample of a batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fdcr_fast.importance.data import Batch
from fdcr_fast.importance.estimate import Estimate
from fdcr_fast.importance.kinds import Kind, Pass
from fdcr_fast.importance.losses import losses_of
from fdcr_fast.importance.per_sample import PerSampleGradients, plain_gradients
from fdcr_fast.importance.stateless import Stateless

_log = logging.getLogger("fdcr_fast")

CHECKS = ("first", "all", "off")

# One sample is checked as part of so many: few cost little, and faults that need more than one show.
_SAMPLES = 3

# Relative difference of a parameter's gradient, in norm: rounding may put the input of a ReLU on the other side of
# zero, which moves gradients by per cents; the faults that the check is for, by a half and more.
_TOLERANCE = 0.05
# Gradients that are nothing but rounding, such as those of key biases in attention, relative to all others.
_NOISE = 1e-5

# What has passed of each model, so that many clients' Fishers are not all checked.
_passed: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


class Check:
    """Compares the way of an estimate with plain autograd, on samples chosen by a generator of a fixed seed.

    Args:
        how: ``"first"``: the first batch, unless one alike has passed with this model. ``"all"``: every batch.
            ``"off"``: none.
        model: The arguments of :class:`Estimate`, as are the next ones.
        label: What else there is to a batch that is alike.
        generator: Where the kind takes its random numbers from.
    """

    def __init__(
        self,
        how: str,
        model: Stateless,
        names: Sequence[str],
        kind: Kind,
        fallback: PerSampleGradients,
        label: Any,
        generator: torch.Generator | None,
    ) -> None:
        if how not in CHECKS:
            raise ValueError(f"unknown check {how!r}: expected one of {', '.join(CHECKS)}")
        self._how = how
        self._model = model
        self._params = {name: model.params[name] for name in names}
        self._kind = kind
        self._fallback = fallback
        self._label = label
        self._generator = generator
        self._samples = torch.Generator().manual_seed(0)
        self._distrusted: set[str] = set()

    def __call__(self, estimate: Estimate, batch: Batch) -> None:
        """Checks a batch that is about to be added; parameters that differ are left to plain autograd, with a warning.

        Raises:
            RuntimeError: They differ only now, after other batches were added.
        """
        if self._how == "off" or batch.samples == 0 or (self._how == "first" and estimate.samples > 0):
            return
        passed, alike = _passed.setdefault(self._model.module, set()), self._alike(batch)
        if self._how == "first" and alike in passed:
            return
        try:
            differing = sorted(self._differing(batch) - self._distrusted)
        except Exception as error:  # the batch itself will say so, unless the model takes no few samples
            _log.info("not checked: %s", error)
            return
        if not differing:
            passed.add(alike)
            return
        message = f"per-sample gradients of {', '.join(differing)} are not those of plain autograd"
        if estimate.samples > 0:
            raise RuntimeError(
                f"{message} after the first {estimate.samples} samples: what was added before may be wrong, too. "
                "Please report the model; batch_size=1 may help"
            )
        warnings.warn(
            f"{message}: they are computed one sample at a time, which is slow. Does the model treat the samples of a "
            "batch independently of each other? If so, please report it",
            stacklevel=3,
        )
        self._distrusted.update(differing)
        estimate.one_by_one(differing)

    def _differing(self, batch: Batch) -> set[str]:
        """The parameters whose squared gradients differ for one sample, among few."""
        chosen = torch.randperm(batch.samples, generator=self._samples)[:_SAMPLES]
        few = batch.with_tensors(x[chosen.to(x.device)] for x in batch.tensors).to(self._device)
        passes: list[Pass] = []

        def first_alone(output: Any, targets: Any) -> Iterator[Pass]:
            each = next(self._kind(output, targets))
            passes.append(each)
            alone = torch.zeros(few.samples, device=self._device)
            alone[0] = 1

            def loss(output: Any, targets: Any) -> Tensor:
                targets, alone = targets
                losses: Tensor = losses_of(each.loss, output, targets) * alone
                return losses

            yield Pass((each.targets, alone), loss)

        with self._random_numbers_kept():
            fast = Estimate(self._model, list(self._params), first_alone, self._fallback)
            fast.add(few)
            inputs, _ = few.tree()
            sample = Batch.of(inputs, passes[-1].targets).part(slice(0, 1))
            before = self._random_state()
            plain = plain_gradients(self._model, passes[-1].loss, list(self._params), sample)
            if not torch.equal(before, self._random_state()):
                _log.info("not checked: the forward pass draws random numbers")
                return set()
        return self._unlike(fast.sums, plain)

    def _unlike(self, squares: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> set[str]:
        wanted = {
            name: grads[name].to(s).abs() if name in grads else torch.zeros_like(s) for name, s in squares.items()
        }
        total = torch.stack([g.norm() for g in wanted.values()]).norm()
        if not total.isfinite():
            return set()
        dtype = next(iter(self._params.values())).dtype
        if torch.is_autocast_enabled(self._device.type):
            dtype = torch.get_autocast_dtype(self._device.type)
        tolerance = max(_TOLERANCE, 64 * torch.finfo(dtype).eps)
        return {
            name
            for name, g in wanted.items()
            if not (squares[name].sqrt() - g).norm() <= tolerance * g.norm() + _NOISE * total
        }

    @property
    def _device(self) -> torch.device:
        return next(iter(self._params.values())).device

    def _alike(self, batch: Batch) -> Any:
        structure = tuple(
            (type(m), m.training, "forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in self._model.module.modules()
        )
        data = tuple((x.shape[1:], x.dtype) for x in batch.tensors)
        params = tuple((name, p.dtype) for name, p in self._params.items())
        return self._label, structure, data, params, torch.is_autocast_enabled(self._device.type)

    def _random_state(self) -> Tensor:
        return torch.get_rng_state() if self._device.type == "cpu" else torch.cuda.get_rng_state(self._device)

    @contextmanager
    def _random_numbers_kept(self) -> Iterator[None]:
        state = None if self._generator is None else self._generator.get_state()
        with torch.random.fork_rng([] if self._device.type == "cpu" else [self._device]):
            yield
        if self._generator is not None and state is not None:
            self._generator.set_state(state)
