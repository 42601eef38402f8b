"""What is checked: operators beside their references, a Fisher beside autograd, rounds beside the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fdcr_fast
from fdcr_fast.ops.backends import with_kernels
from fdcr_fast.ops.operator import OPERATORS
from fdcr_fast.self_test.samples import samples

# Relative to the largest number of a tensor: what rounding may make of it on the way to a result of its type.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-5}
_PARAMS = 5003  # whole vectors of any width, and some left over
_CLIENTS, _ATTACKERS = 10, 3


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What is compared.
        backend: Whose computation is compared.
        run: A function that raises AssertionError where the results differ, and whatever the computation raises.
    """

    name: str
    backend: str
    run: Callable[[], None]

    def failure(self) -> str | None:
        """What is wrong, or None where the results agree."""
        try:
            self.run()
        except Exception as error:  # whatever is wrong with an installation is what is asked for
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None


def checks() -> Iterator[Check]:
    """All that is compared on this machine, on numbers that are the same every time."""
    usable = {name for name, status in fdcr_fast.backends().items() if status.usable}
    here = "cpu" if "cpu" in usable else "reference"
    for name in OPERATORS:
        yield Check(f"operator {name}", here, partial(_operator, name, "cpu"))
    if torch.cuda.is_available():
        kernels = {"cuda": with_kernels("cuda") if "cuda" in usable else set()}
        kernels["triton"] = with_kernels("triton") - kernels["cuda"] if "triton" in usable else set()
        for backend, names in kernels.items():
            for name in sorted(names):
                yield Check(f"operator {name}", backend, partial(_operator, name, "cuda"))
    yield Check("diagonal Fisher of a network", here, _fisher)
    for rule in ("FDCR", "CoalitionFDCR"):
        yield Check(f"round of {rule}", here, partial(_round, rule))


def _compare(found: Any, expected: Any) -> None:
    """Tensors in tuples and lists: dtypes, shapes, and values up to rounding."""
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(one, Tensor):
            largest = other.double().where(other.isfinite(), 0).abs().max().item() if other.numel() else 0.0
            tolerance = _TOLERANCE.get(other.dtype, 0.0)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)


def _operator(name: str, device: str) -> None:
    """By way of the dispatcher and by the reference: what is returned, and what was written to the arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = samples(_PARAMS, device)[name]
    for args in calls:
        again = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
        operator = OPERATORS[name]
        _compare((operator(*args), args), (operator.reference(*again), again))


def _fisher() -> None:
    """Convolution, norm and linear layers, beside squared gradients of one sample after the other in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        model = nn.Sequential(*layers)
        images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    found = fdcr_fast.diagonal_fisher(model, (images, labels), check="off")
    model.double()
    squares = torch.zeros(found.shape, dtype=torch.float64)
    for image, label in zip(images.double(), labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), list(model.parameters()))
        squares += torch.cat([grad.flatten() for grad in grads]).square()
    _compare(found.double(), squares / len(images))


def _round(rule: str) -> None:
    """Attackers who share a step and have Fishers of their own are dropped, and the others averaged by the formula."""
    generator = torch.Generator().manual_seed(0)
    w, common = torch.randn(2, _PARAMS, generator=generator)
    noise = torch.randn(_CLIENTS, _PARAMS, generator=generator)
    fishers = torch.rand(_CLIENTS, _PARAMS, generator=generator)
    updates = 0.01 * noise
    updates[:_ATTACKERS] += 0.05 * common
    num_samples = list(range(10, 10 + _CLIENTS))
    store = fdcr_fast.UpdateStore(_PARAMS, _CLIENTS)
    for k in range(_CLIENTS):
        store.put(updates[k], fishers[k], num_samples[k], k)
    makers: dict[str, Callable[[], fdcr_fast.AggregationRule]] = {
        "FDCR": fdcr_fast.FDCR,
        "CoalitionFDCR": partial(fdcr_fast.CoalitionFDCR, start="bold"),
    }
    made = makers[rule]
    results = made().aggregate(w, updates, fishers, num_samples), made().aggregate(w, store)
    shares = torch.tensor([0.0] * _ATTACKERS + [float(n) for n in num_samples[_ATTACKERS:]], dtype=torch.float64)
    shares /= shares.sum()
    importances = fishers.double() - fishers.amin(1, keepdim=True)
    importances /= importances.amax(1, keepdim=True)
    factors = 2 * importances.sigmoid() if rule == "FDCR" else torch.ones_like(importances)
    expected = w + shares @ (factors * updates)
    for result in results:
        if result.dropped_clients != list(range(_ATTACKERS)):
            raise AssertionError(f"dropped {result.dropped_clients} instead of the first {_ATTACKERS}")
        _compare(result.params.double(), expected)
