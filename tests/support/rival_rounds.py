"""Rounds for the rules that take updates alone, and one rule of each kind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from hypothesis import strategies as st

from fdcr_fast import (
    CRFL,
    FLAME,
    RLR,
    AlignIns,
    Bulyan,
    CoordinateMedian,
    DnC,
    Finetuning,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    ModelQuality,
    MultiKrum,
    MultiMetrics,
    Sageflow,
    TrimmedMean,
    UpdateStore,
    ops,
)
from tests.support.sizes import sizes


def quality(params):
    size = params.double().norm().item()
    return ModelQuality(0.5 + math.sin(size) / 2, 1 + size % 1)


def toward_one(params):
    return 0.1 * torch.ones_like(params)


# Rules that take rounds of any size.
RULES = {
    "median": lambda: CoordinateMedian(),
    "trimmed mean": lambda: TrimmedMean(num_byzantine=0),
    "krum": lambda: Krum(num_byzantine=1),
    "multi-krum": lambda: MultiKrum(num_byzantine=2),
    "bulyan": lambda: Bulyan(num_byzantine=1),
    "geometric median": lambda: GeometricMedian(),
    "rlr": lambda: RLR(threshold=3),
    "foolsgold": lambda: FoolsGold(),
    "dnc": lambda: DnC(num_byzantine=2),
    "flame": lambda: FLAME(noise=0.01),
    "alignins": lambda: AlignIns(),
    "crfl": lambda: CRFL(param_norm=2.0, noise=0.1),
    "multi-metrics": lambda: MultiMetrics(keep_share=0.5),
    "fltrust": lambda: FLTrust(server_update=toward_one),
    "finetuning": lambda: Finetuning(refine=lambda params: params + toward_one(params)),
    "sageflow": lambda: Sageflow(evaluate=quality, entropy_threshold=0.9),
}


@dataclasses.dataclass
class Problem:
    w: torch.Tensor
    updates: torch.Tensor
    n: list[int]

    @property
    def D(self):  # noqa: N802
        return self.updates.double().numpy()

    def apply(self, rule, **options):
        return rule.aggregate(self.w, self.updates, None, self.n, **options)

    def store(self, path=None):
        K, P = self.updates.shape
        where = {} if path is None else {"path": path, "max_resident": 1 << 20, "sync": False}
        store = UpdateStore(P, K, self.updates.dtype, with_fishers=False, **where)
        for client, update in enumerate(self.updates):
            assert store.put(update, None, self.n[client])
        return store


def problem(seed, K, P, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    spread = rng.lognormal(0, 0.5, (K, 1))
    common = rng.normal(size=P)
    return Problem(
        torch.from_numpy(rng.normal(size=P)).to(dtype),
        torch.from_numpy((common + spread * rng.normal(size=(K, P))) / 10).to(dtype),
        rng.integers(1, 100, K).tolist(),
    )


@st.composite
def drawn_problems(draw, clients=(1, 14), params=(1, 60)):
    """Rounds in float64, and those of the fast path also in float32, in which it forms products."""
    K, P = draw(st.integers(*clients)), draw(sizes(*params))
    dtype = draw(st.sampled_from([torch.float32, torch.float64])) if P >= ops.STRETCH else torch.float64
    return problem(draw(st.integers(0, 2**31)), K, P, dtype)


problems = drawn_problems()


def assert_step(given, result, expected, rtol=1e-9):
    if given.updates.dtype == torch.float32:
        rtol = max(rtol, 1e-6)
    step = result.params.double().numpy() - given.w.double().numpy()
    size = np.abs(given.w.double().numpy()).max() + np.abs(given.D).max()
    np.testing.assert_allclose(step, expected, rtol=rtol, atol=rtol * size)


def kept(result):
    return set(result.kept_clients)
