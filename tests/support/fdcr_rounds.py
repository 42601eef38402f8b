"""Rounds for FDCR, and the result that the transcribed formulas have of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fdcr_fast import UpdateStore
from tests.support import transcription

P = 3 * 4096 + 100  # of attacked rounds: more than is sampled, and no whole number of blocks


@dataclasses.dataclass
class Round:
    w: torch.Tensor
    updates: torch.Tensor
    fishers: torch.Tensor
    n: list[int]

    def aggregate(self, rule, **options):
        return rule.aggregate(self.w, self.updates, self.fishers, self.n, **options)

    def store(self, tile=None, dtype=None):
        store = UpdateStore(len(self.w), len(self.n), dtype or self.updates.dtype, tile=tile)
        for update, fisher, n in zip(self.updates, self.fishers, self.n, strict=True):
            assert store.put(update, fisher, n)
        return store


def random_round(seed, K, P, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, 0.7, (K, 1))  # norms differ, but not beyond the norm bound
    fishers = rng.lognormal(0, 2, (K, P))
    fishers[:, 0] = 0  # so that none is constant in bfloat16
    return Round(
        torch.from_numpy(rng.normal(size=P)).to(dtype),
        torch.from_numpy(rng.normal(size=(K, P)) * scale).to(dtype),
        torch.from_numpy(fishers).to(dtype),
        rng.integers(1, 1000, K).tolist(),
    )


def transcribed(round_, **options):
    return transcription.fdcr(
        round_.w.double().tolist(),
        round_.updates.double().tolist(),
        round_.fishers.double().tolist(),
        round_.n,
        **options,
    )


def assert_is(result, expected):
    params, V, kept, labels, weights = expected
    # bfloat16 parameters are rounded once, at the end: compare with the rounded reference.
    reference = torch.from_numpy(params).to(result.params.dtype).double()
    difference = torch.linalg.vector_norm(result.params.double() - reference)
    assert difference <= {torch.bfloat16: 2**-8}.get(result.params.dtype, 1e-5) * torch.linalg.vector_norm(reference)
    np.testing.assert_allclose(result.discrepancy, V, rtol=1e-5)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-12)
    assert result.kept.tolist() == kept.tolist()
    assert result.labels.tolist() == labels.tolist()


def attacked(K=20, seed=0, dtype=torch.float32, attackers=4):
    generator = torch.Generator().manual_seed(seed)
    updates = 0.01 * torch.randn(K, P, generator=generator)
    updates[:attackers] += 0.05 * torch.randn(P, generator=generator)
    fishers = torch.rand(K, P, generator=generator)
    return torch.randn(P, generator=generator), updates.to(dtype), fishers.to(dtype), torch.arange(1, K + 1) * 10.0
