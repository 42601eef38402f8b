"""The self-check: the fast way is compared with plain autograd on two samples of a batch."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack

from fdcr_fast.fisher.data import Batch
from fdcr_fast.fisher.estimate import Estimate
from fdcr_fast.fisher.kinds import Kind, Pass
from fdcr_fast.fisher.layers import RULES
from fdcr_fast.fisher.model.settings import settings_of
from fdcr_fast.fisher.model.stateless import Stateless
from fdcr_fast.fisher.per_sample import PerSampleGradients, plain_gradients
from fdcr_fast.warning import callers_level

_log = logging.getLogger("fdcr_fast")

CHECKS = ("first", "all", "off")

# Relative difference of a parameter's gradient, in norm: rounding may put the input of a ReLU on the other side of
# zero, which moves gradients by per cents; the faults that the check is for, by a half and more.
_TOLERANCE = 0.05
# Gradients that are nothing but rounding, such as those of key biases in attention, relative to all others.
_NOISE = 1e-5

# The parameters that differed, by what there was to check; none of what has passed. So the Fishers of many clients are
# not all checked, and what was wrong for one client is not right for the next one whose sample does not show it.
_verdicts: dict[Any, frozenset[str]] = {}


class Check:
    """Compares the way of an estimate with plain autograd, on samples chosen by a generator of a fixed seed.

    Args:
        how: ``"first"``: the first batch, unless one alike has passed before. ``"all"``: every batch. ``"off"``: none.
        model: The arguments of :class:`Estimate`, as are the next ones.
        settings: A key for all models and losses that go the same way.
        generator: The generator that the kind takes its random numbers from.
    """

    def __init__(
        self,
        how: str,
        model: Stateless,
        names: Sequence[str],
        kind: Kind,
        fallback: PerSampleGradients,
        settings: Hashable,
        generator: torch.Generator | None,
    ) -> None:
        if how not in CHECKS:
            raise ValueError(f"unknown check {how!r}: expected one of {', '.join(CHECKS)}")
        self._how = how
        self._model = model
        self._params = {name: model.params[name] for name in names}
        self._kind = kind
        self._fallback = fallback
        self._settings = settings
        self._generator = generator
        self._samples = torch.Generator().manual_seed(0)
        self._types = {type(module) for module in model.module.modules()}
        self._shown = False  # by a batch of several samples, whether they are kept apart

    def __call__(self, estimate: Estimate, batch: Batch) -> None:
        """Checks a batch that is about to be added; parameters that differ are left to plain autograd, with a warning.

        Raises:
            RuntimeError: They differ only now, after other batches were added.
        """
        if self._how == "off" or batch.samples == 0 or (self._how == "first" and self._shown):
            return
        self._shown = batch.samples > 1
        alike = self._alike(batch)
        differing = _verdicts.get(alike)
        if not differing:
            if differing is not None and self._how == "first":
                return
            try:
                differing = self._differing(batch)
            except Exception as error:  # the batch itself will say so
                _log.info("not checked: %s", error)
                return
            if differing is None:
                self._shown = False
                return
            if differing or batch.samples > 1:  # one sample alone cannot be confused with others
                _verdicts[alike] = differing
        if not differing:
            return
        message = f"per-sample gradients of {', '.join(sorted(differing))} are not those of plain autograd"
        if self._how == "all" and estimate.samples > 0:
            raise RuntimeError(
                f"{message} after the first {estimate.samples} samples: what was added before may be wrong, too. "
                "Please report the model; batch_size=1 may help"
            )
        warnings.warn(
            f"{message}: they are computed one sample at a time, which is slow. Does the model treat the samples of a "
            "batch independently of each other? If so, please report it",
            stacklevel=callers_level(),
        )
        # All parameters: what is wrong for this sample of some may be wrong for other samples of others.
        estimate.one_by_one()
        self._how = "off"  # nothing is left to compare, nor may what follows count as passed

    def _differing(self, batch: Batch) -> frozenset[str] | None:
        """The parameters whose squared gradients differ for two samples of the batch; None if these show nothing.

        Two, since the square of one gradient alone is also that of the sum over the batch. They may have no entry in
        common: users' rules are given one of them twice as well.
        """
        # Not the first one if there are more, which models may compare the others with.
        first = int(batch.samples > 2)
        start = int(torch.randint(first, max(batch.samples - 1, 1), (1,), generator=self._samples))
        chosen = slice(start, min(start + 2, batch.samples))
        batch = batch.to(self._device)
        differing = self._differing_for(batch, chosen)
        users = any(not RULES[t].sum_squares.__module__.startswith("fdcr_fast.") for t in self._types & RULES.keys())
        if differing is not None and users and batch.samples > 1:
            differing |= self._differing_for(batch.with_repeated(start, start + 1), chosen) or frozenset()
        return differing

    def _differing_for(self, batch: Batch, chosen: slice) -> frozenset[str] | None:
        passes: list[Pass] = []

        def noted(output: Any, targets: Any) -> Iterator[Pass]:
            passes[:] = self._kind(output, targets)
            yield passes[0]

        with self._random_numbers_kept():
            fast = Estimate(self._model, list(self._params), noted, self._fallback, chosen)
            fast.add(batch)
            whole = batch.with_targets(passes[0].targets)
            before = self._random_state()
            plain = {name: torch.zeros_like(x) for name, x in fast.sums.items()}
            for i in range(chosen.start, chosen.stop):
                alone = whole.part(slice(i, i + 1))
                for name, g in plain_gradients(self._model, passes[0].loss, list(self._params), alone).items():
                    plain[name] += g.to(plain[name]).square()
            if not torch.equal(before, self._random_state()):
                _log.info("not checked: the forward pass draws random numbers")
                self._how = "off"
                return None
        return self._unlike(fast.sums, plain)

    def _unlike(self, squares: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> frozenset[str] | None:
        wanted = {name: x.sqrt() for name, x in plain.items()}
        total = torch.stack([g.norm() for g in wanted.values()]).norm()
        if not total.isfinite() or total == 0:
            return None
        dtype = next(iter(self._params.values())).dtype
        if torch.is_autocast_enabled(self._device.type):
            dtype = torch.get_autocast_dtype(self._device.type)
        tolerance = max(_TOLERANCE, 64 * torch.finfo(dtype).eps)
        return frozenset(
            name
            for name, g in wanted.items()
            if not (squares[name].sqrt() - g).norm() <= tolerance * g.norm() + _NOISE * total
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self._params.values())).device

    def _alike(self, batch: Batch) -> tuple[Any, ...]:
        """A key for all batches, of any model, that go the same way as far as can be seen without a call."""
        data = tuple((x.shape[1:], x.dtype) for x in batch.tensors), settings_of(batch.shared)
        params = tuple((name, p.shape, p.dtype) for name, p in self._params.items())
        rules = frozenset((weakref.ref(t), weakref.ref(RULES[t])) for t in self._types & RULES.keys())
        return self._settings, data, params, rules, torch.is_autocast_enabled(self._device.type), _surroundings()

    def _random_state(self) -> Tensor:
        return torch.get_rng_state() if self._device.type == "cpu" else torch.cuda.get_rng_state(self._device)

    @contextmanager
    def _random_numbers_kept(self) -> Iterator[None]:
        state = None if self._generator is None else self._generator.get_state()
        with torch.random.fork_rng([] if self._device.type == "cpu" else [self._device]):
            yield
        if self._generator is not None and state is not None:
            self._generator.set_state(state)


def _surroundings() -> Hashable:
    """Whatever is done to all models: hooks of all modules, functions that were exchanged, and modes."""
    hooks = [settings_of(list(x.values())) for name, x in vars(_module).items() if name in _GLOBAL_HOOKS]
    saved = torch._C._autograd._top_saved_tensors_default_hooks(False)
    functions = hash(tuple(map(id, vars(F).values())))
    return *hooks, functions, len(_get_current_function_mode_stack()), saved and tuple(map(settings_of, saved))


_GLOBAL_HOOKS = frozenset(name for name in vars(_module) if name.startswith("_global") and name.endswith("hooks"))
