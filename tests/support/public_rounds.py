"""Rules and rounds that the tests of the public interface draw, and how they compare what came of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from fdcr_fast import (
    CRFL,
    FDCR,
    FLAME,
    RLR,
    AlignIns,
    Bulyan,
    CoalitionFDCR,
    CoordinateMedian,
    DnC,
    FedAvg,
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
)
from tests.support.ways_in import IDS, MODELS, Round

# Every rule, and the fewest clients that it takes.
RULES = {
    "fdcr": (FDCR, 1),
    "fdcr of the published code": (lambda: FDCR(discrepancy="l2", rescale=False), 1),
    "fdcr, bare": (lambda: FDCR(cluster="kmeans", importance=False, norm_bound=None), 1),
    "coalition": (CoalitionFDCR, 1),
    "fedavg": (FedAvg, 1),
    "norm clipping": (lambda: FedAvg(clip="median", max_weight_share=0.5), 1),
    "median": (CoordinateMedian, 1),
    "trimmed mean": (lambda: TrimmedMean(num_byzantine=1), 3),
    "krum": (lambda: Krum(num_byzantine=1), 5),
    "multi-krum": (lambda: MultiKrum(num_byzantine=1, num_selected=2), 5),
    "bulyan": (lambda: Bulyan(num_byzantine=0), 3),
    "geometric median": (GeometricMedian, 1),
    "foolsgold": (FoolsGold, 1),
    "rlr": (lambda: RLR(threshold=2), 1),
    "dnc": (lambda: DnC(num_byzantine=1), 3),
    "flame": (FLAME, 1),
    "alignins": (AlignIns, 1),
    "crfl": (lambda: CRFL(param_norm=2.0), 1),
    "multi-metrics": (lambda: MultiMetrics(keep_share=0.5), 3),  # two are as far from each other: the first is kept
    "fltrust": (lambda: FLTrust(server_update=lambda w: 0.1 * torch.ones_like(w)), 1),
    "finetuning": (lambda: Finetuning(refine=lambda w: 0.5 * w), 1),
    "sageflow": (
        lambda: Sageflow(
            evaluate=lambda w: ModelQuality(0.5, 1 + w.double().norm().item()),
        ),
        1,
    ),
}
MOST = 6


def plain(client):
    return str(client) if isinstance(client, str) else int(client)


def bits(value: Any) -> Any:
    """What cannot be told apart has the same."""
    if isinstance(value, nn.Module):
        return bits(value.state_dict())
    if isinstance(value, torch.Tensor):
        numbers = b"" if value.is_meta else value.detach().to_dense().numpy().tobytes()
        return str(value.dtype), tuple(value.shape), numbers
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(str(key), bits(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    return repr(value) if isinstance(value, int | float | str | bytes | None) else None


@st.composite
def rounds(draw, fewest=1):
    model, ids = draw(st.sampled_from(sorted(MODELS))), draw(st.sampled_from(sorted(IDS)))
    return Round(draw(st.integers(0, 2**32 - 1)), draw(st.integers(fewest, MOST)), model, ids)


@st.composite
def rules_and_rounds(draw, names=tuple(RULES), spare=0):
    """A rule, made anew by each call, and a round of enough clients for it, and of ``spare`` more."""
    name = draw(st.sampled_from(names))
    make, fewest = RULES[name]
    return make, draw(rounds(fewest + spare))


def by_client(result, name):
    return dict(zip(result.clients, getattr(result, name).tolist(), strict=True))


def assert_same_result(result, expected, without=()):
    """The same decisions about the same clients, those left out on one side or the other aside."""
    torch.testing.assert_close(result.params, expected.params, rtol=2e-6, atol=2e-6)
    for name, options in {
        "kept": {},
        "labels": {},
        "weights": {"rel": 1e-6, "abs": 1e-9},
        "discrepancy": {"rel": 1e-5, "abs": 1e-9, "nan_ok": True},
    }.items():
        here, there = by_client(result, name), by_client(expected, name)
        for client in without:
            here.pop(client, None)
        assert here == (pytest.approx(there, **options) if options else there), name
